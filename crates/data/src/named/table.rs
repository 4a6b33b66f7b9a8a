//! The slots of each named template. `{c}` is the content, `{bos}` and `{eos}` are the tokenizer's tokens.

/// How tools and their calls are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tools {
    /// Not at all.
    None,
    /// As Hermes and Qwen do: JSON in `<tools>` and `<tool_call>`.
    Hermes,
}

/// A template in pieces.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slots {
    pub(super) name: &'static str,
    /// Before everything.
    pub(super) prefix: &'static str,
    pub(super) system: &'static str,
    /// The system message where the data has none.
    pub(super) default_system: &'static str,
    /// Whether the system message is a part of the first turn.
    pub(super) system_in_first_turn: bool,
    pub(super) user: &'static str,
    /// The result of a tool.
    pub(super) observation: &'static str,
    /// What opens a turn of the assistant.
    pub(super) header: &'static str,
    pub(super) assistant: &'static str,
    /// The EOS token that it brings (`replace_eos`).
    pub(super) eos: Option<&'static str>,
    /// Whether EOS stands only at the very end (`efficient_eos`).
    pub(super) eos_at_the_end: bool,
    /// What opens and closes a thought.
    pub(super) thoughts: Option<(&'static str, &'static str)>,
    pub(super) tools: Tools,
}

/// What introduces a list of tools, and what follows it.
pub(super) const HERMES_TOOLS: (&str, &str) = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function \
     signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within \
     <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n\
     </tool_call>",
);

const THINK: Option<(&str, &str)> = Some(("<think>\n", "\n</think>\n\n"));

/// Contents alone, answers with EOS: what LLaMA-Factory takes for a slot that isn't given.
const PLAIN: Slots = Slots {
    name: "",
    prefix: "",
    system: "{c}",
    default_system: "",
    system_in_first_turn: false,
    user: "{c}",
    observation: "{c}",
    header: "",
    assistant: "{c}{eos}",
    eos: None,
    eos_at_the_end: false,
    thoughts: None,
    tools: Tools::None,
};

const CHATML: Slots = Slots {
    system: "<|im_start|>system\n{c}<|im_end|>\n",
    user: "<|im_start|>user\n{c}<|im_end|>\n",
    observation: "<|im_start|>tool\n{c}<|im_end|>\n",
    header: "<|im_start|>assistant\n",
    assistant: "{c}<|im_end|>\n",
    ..PLAIN
};

const QWEN: Slots = Slots {
    observation: "<|im_start|>user\n<tool_response>\n{c}\n</tool_response><|im_end|>\n",
    eos: Some("<|im_end|>"),
    tools: Tools::Hermes,
    ..CHATML
};

const GEMMA: Slots = Slots {
    prefix: "{bos}",
    system: "{c}\n\n",
    system_in_first_turn: true,
    user: "<start_of_turn>user\n{c}<end_of_turn>\n",
    observation: "<start_of_turn>tool\n{c}<end_of_turn>\n",
    header: "<start_of_turn>model\n",
    assistant: "{c}<end_of_turn>\n",
    ..PLAIN
};

const GLM: Slots = Slots {
    prefix: "[gMASK]<sop>",
    system: "<|system|>\n{c}",
    user: "<|user|>\n{c}",
    observation: "<|observation|>\n{c}",
    header: "<|assistant|>",
    assistant: "\n{c}",
    eos_at_the_end: true,
    ..PLAIN
};

const GRANITE: Slots = Slots {
    system: "<|start_of_role|>system<|end_of_role|>{c}<|end_of_text|>\n",
    user: "<|start_of_role|>user<|end_of_role|>{c}<|end_of_text|>\n",
    observation: "<|start_of_role|>user<|end_of_role|>{c}<|end_of_text|>\n",
    header: "<|start_of_role|>assistant<|end_of_role|>",
    assistant: "{c}<|end_of_text|>\n",
    ..PLAIN
};

const LLAMA2: Slots = Slots {
    system: "<<SYS>>\n{c}\n<</SYS>>\n\n",
    system_in_first_turn: true,
    user: "{bos}[INST] {c} [/INST]",
    observation: "{bos}[INST] {c} [/INST]",
    ..PLAIN
};

const DEEPSEEK3: Slots = Slots {
    prefix: "{bos}",
    user: "<｜User｜>{c}",
    observation: "<｜User｜>{c}",
    header: "<｜Assistant｜>",
    ..PLAIN
};

const PHI: Slots = Slots {
    system: "<|system|>\n{c}<|end|>\n",
    user: "<|user|>\n{c}<|end|>\n",
    observation: "<|user|>\n{c}<|end|>\n",
    header: "<|assistant|>\n",
    assistant: "{c}<|end|>\n",
    eos: Some("<|end|>"),
    ..PLAIN
};

/// All of them, by name.
#[rustfmt::skip]
pub(super) const TABLE: &[Slots] = &[
    Slots { name: "alpaca", user: "### Instruction:\n{c}\n\n", observation: "### Instruction:\n{c}\n\n", header: "### Response:\n", assistant: "{c}{eos}\n\n",
        default_system: "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n", ..PLAIN },
    Slots { name: "chatml", eos: Some("<|im_end|>"), ..CHATML },
    Slots { name: "chatml_de", eos: Some("<|im_end|>"), default_system: "Du bist ein freundlicher und hilfsbereiter KI-Assistent.", ..CHATML },
    Slots { name: "cohere", prefix: "{bos}",
        system: "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{c}<|END_OF_TURN_TOKEN|>",
        user: "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{c}<|END_OF_TURN_TOKEN|>",
        observation: "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{c}<|END_OF_TURN_TOKEN|>",
        header: "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", ..PLAIN },
    Slots { name: "cpm4", prefix: "{bos}", ..CHATML },
    Slots { name: "deepseek", prefix: "{bos}", system: "{c}\n\n", user: "User: {c}\n\n", observation: "User: {c}\n\n", header: "Assistant:", ..PLAIN },
    Slots { name: "deepseek3", ..DEEPSEEK3 },
    Slots { name: "deepseekr1", thoughts: THINK, ..DEEPSEEK3 },
    Slots { name: "default", system: "System: {c}{eos}\n", user: "Human: {c}{eos}\n", observation: "Human: {c}{eos}\n", header: "Assistant:", assistant: "{c}{eos}\n", ..PLAIN },
    Slots { name: "empty", assistant: "{c}", ..PLAIN },
    Slots { name: "exaone", system: "[|system|]{c}[|endofturn|]\n", user: "[|user|]{c}\n", observation: "[|user|]{c}\n", header: "[|assistant|]", assistant: "{c}{eos}\n", ..PLAIN },
    Slots { name: "falcon_h1", prefix: "{bos}", ..CHATML },
    Slots { name: "gemma", eos: Some("<end_of_turn>"), ..GEMMA },
    Slots { name: "gemma2", eos_at_the_end: true, ..GEMMA },
    Slots { name: "gemma3", eos: Some("<end_of_turn>"), ..GEMMA },
    Slots { name: "glm4", ..GLM },
    Slots { name: "glm4_moe", thoughts: THINK, ..GLM },
    Slots { name: "glmz1", thoughts: THINK, ..GLM },
    Slots { name: "granite3", ..GRANITE },
    Slots { name: "hunyuan", prefix: "<|startoftext|>", system: "{c}<|extra_4|>", user: "{c}<|extra_0|>", observation: "{c}<|extra_0|>", assistant: "{c}<|eos|>", ..PLAIN },
    Slots { name: "intern2", prefix: "{bos}",
        default_system: "You are an AI assistant whose name is InternLM (书生·浦语).\n- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as English and 中文.", ..CHATML },
    Slots { name: "lfm2", eos: Some("<|im_end|>"), default_system: "You are a helpful AI assistant.", observation: "<|im_start|>tool\n<|tool_response_start|>{c}<|tool_response_end|><|im_end|>\n", ..CHATML },
    Slots { name: "llama2", ..LLAMA2 },
    Slots { name: "llama2_zh", default_system: "You are a helpful assistant. 你是一个乐于助人的助手。", ..LLAMA2 },
    Slots { name: "llama3", prefix: "{bos}", eos: Some("<|eot_id|>"),
        system: "<|start_header_id|>system<|end_header_id|>\n\n{c}<|eot_id|>",
        user: "<|start_header_id|>user<|end_header_id|>\n\n{c}<|eot_id|>",
        observation: "<|start_header_id|>ipython<|end_header_id|>\n\n{c}<|eot_id|>",
        header: "<|start_header_id|>assistant<|end_header_id|>\n\n", assistant: "{c}<|eot_id|>", ..PLAIN },
    Slots { name: "llama4", prefix: "{bos}", eos: Some("<|eot|>"),
        system: "<|header_start|>system<|header_end|>\n\n{c}<|eot|>",
        user: "<|header_start|>user<|header_end|>\n\n{c}<|eot|>",
        observation: "<|header_start|>ipython<|header_end|>\n\n{c}<|eot|>",
        header: "<|header_start|>assistant<|header_end|>\n\n", assistant: "{c}<|eot|>", ..PLAIN },
    Slots { name: "mimo", default_system: "You are a helpful assistant.", thoughts: THINK, ..QWEN },
    Slots { name: "ministral", prefix: "{bos}", system: "{c}\n\n", system_in_first_turn: true, user: "[INST]{c}[/INST]", observation: "[TOOL_RESULTS]{\"content\": {c}}[/TOOL_RESULTS]", ..PLAIN },
    Slots { name: "mistral", prefix: "{bos}", system: "{c}\n\n", system_in_first_turn: true, user: "[INST] {c}[/INST]", observation: "[TOOL_RESULTS] {\"content\": {c}}[/TOOL_RESULTS]", assistant: " {c}{eos}", ..PLAIN },
    Slots { name: "mistral_small", prefix: "{bos}", system: "[SYSTEM_PROMPT]{c}[/SYSTEM_PROMPT]", user: "[INST]{c}[/INST]", observation: "[TOOL_RESULTS]{\"content\": {c}}[/TOOL_RESULTS]", ..PLAIN },
    Slots { name: "moonlight", eos: Some("<|im_end|>"), default_system: "You are a helpful assistant provided by Moonshot-AI.",
        system: "<|im_system|>system<|im_middle|>{c}<|im_end|>",
        user: "<|im_user|>user<|im_middle|>{c}<|im_end|>",
        observation: "<|im_user|>user<|im_middle|>{c}<|im_end|>",
        header: "<|im_assistant|>assistant<|im_middle|>", assistant: "{c}<|im_end|>", ..PLAIN },
    Slots { name: "olmo", prefix: "{eos}", user: "<|user|>\n{c}", observation: "<|user|>\n{c}", header: "<|assistant|>\n", ..PLAIN },
    Slots { name: "openchat", prefix: "{bos}", user: "GPT4 Correct User: {c}{eos}", observation: "GPT4 Correct User: {c}{eos}", header: "GPT4 Correct Assistant:", ..PLAIN },
    Slots { name: "opencoder", default_system: "You are OpenCoder, created by OpenCoder Team.", ..CHATML },
    Slots { name: "phi", ..PHI },
    Slots { name: "phi4", eos: Some("<|im_end|>"),
        system: "<|im_start|>system<|im_sep|>{c}<|im_end|>",
        user: "<|im_start|>user<|im_sep|>{c}<|im_end|>",
        observation: "<|im_start|>user<|im_sep|>{c}<|im_end|>",
        header: "<|im_start|>assistant<|im_sep|>", assistant: "{c}<|im_end|>", ..PLAIN },
    Slots { name: "phi4_mini", system: "<|system|>{c}<|end|>", user: "<|user|>{c}<|end|>", observation: "<|user|>{c}<|end|>", header: "<|assistant|>", assistant: "{c}<|end|>", ..PHI },
    Slots { name: "qwen", default_system: "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", ..QWEN },
    Slots { name: "qwen3", thoughts: THINK, ..QWEN },
    Slots { name: "qwen3_nothink", ..QWEN },
    Slots { name: "smollm", ..CHATML },
    Slots { name: "smollm2", default_system: "You are a helpful AI assistant named SmolLM, trained by Hugging Face.", ..CHATML },
    Slots { name: "starchat", header: "<|assistant|>", eos: None, ..PHI },
    Slots { name: "vicuna", user: "USER: {c} ", observation: "USER: {c} ", header: "ASSISTANT:",
        default_system: "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.", ..PLAIN },
    Slots { name: "yi", ..CHATML },
    Slots { name: "zephyr", system: "<|system|>\n{c}{eos}", user: "<|user|>\n{c}{eos}", observation: "<|user|>\n{c}{eos}", header: "<|assistant|>\n", default_system: "You are Zephyr, a helpful assistant.", ..PLAIN },
];
