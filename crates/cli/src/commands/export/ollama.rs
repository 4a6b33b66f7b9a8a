//! A Modelfile for Ollama, beside a GGUF file. Ollama's templates are Go's, not Jinja's: for chat templates that it knows
//! it has its own; any other is taken apart here, by what it writes around the messages of a conversation.
//!
//! The form is Ollama's `docs/modelfile.mdx`, the list of templates its `template/index.json`.

use std::fmt::Write;

use ferrotune_data::{Ending, Template};
use ferrotune_tensor::stream_of;
use serde_json::{Map, Value, json};

/// Hashes (FNV-1a) of the chat templates that Ollama knows again.
const KNOWN: [u64; 37] = [
    0x420f_cc29_f31a_339e,
    0x773d_13e1_88af_c917,
    0xcd8b_4900_0db0_2c2c,
    0x7176_9a60_b37b_2975,
    0x51c8_c945_45ac_4017,
    0x89bc_bd75_ce6a_3d28,
    0x88bf_4138_d5c8_26f0,
    0x8a87_094e_0e1e_24c5,
    0xc867_da37_c989_d41f,
    0x4cbe_d0d6_a7c0_90ec,
    0x8c73_4b90_b4f8_d84d,
    0x1451_b8c7_d5e7_5be5,
    0x54f7_4c2d_b3c2_b5b9,
    0x60f5_ee6d_4570_7ba7,
    0xc730_acc0_29ce_6ee0,
    0x3dbb_dd28_c467_0e85,
    0x6026_a4ef_c106_3551,
    0x6336_937c_1429_e601,
    0xcc0d_daa3_9946_7b41,
    0x5de7_47f7_65e2_c199,
    0x5111_253f_4aa4_a502,
    0x5c10_ee65_212d_93b3,
    0xc90d_ea00_b85c_935d,
    0x0e60_067a_5537_498e,
    0x6084_8a05_837c_e656,
    0x7772_e88b_761f_8d6e,
    0x673d_924a_bff5_e532,
    0x713e_0657_1472_b032,
    0xf344_eecf_1bd3_a427,
    0x6057_775a_f4d6_feb9,
    0x4eba_e769_b67b_72f1,
    0x475f_d3e1_6d05_c1af,
    0x6819_06c8_bc12_bb6e,
    0xaffc_62be_3917_a266,
    0xb479_0feb_9157_bf2b,
    0xc0bb_5de6_9aea_a2a7,
    0x0a6d_1e7a_e67a_fa57,
];

/// What a Modelfile names.
pub struct Modelfile<'a> {
    /// The model, as FROM takes it.
    pub from: &'a str,
    /// The adapter's file.
    pub adapter: Option<&'a str>,
    /// The tokens that end a turn.
    pub stops: &'a [String],
    /// The chat template.
    pub template: Option<&'a Template>,
    /// What the tokenizer puts before every text, which Ollama adds itself.
    pub begin: &'a str,
}

impl Modelfile<'_> {
    /// The text.
    pub fn text(&self) -> String {
        let mut text = format!("FROM {}\n", self.from);
        if let Some(adapter) = self.adapter {
            let _ = writeln!(text, "ADAPTER {adapter}");
        }
        for stop in self.stops.iter().filter(|it| !it.contains(['"', '\n'])) {
            let _ = writeln!(text, "PARAMETER stop \"{stop}\"");
        }
        match self.template {
            Some(template) if !is_known(template) => match turns(template, self.begin) {
                Some(turns) => {
                    let _ = writeln!(text, "TEMPLATE \"\"\"{}\"\"\"", turns.go());
                }
                None => text += "# The chat template has no plain form for Ollama; write TEMPLATE by hand.\n",
            },
            _ => {}
        }
        text
    }
}

fn is_known(template: &Template) -> bool {
    let Some(source) = template.source().as_str() else { return false };
    KNOWN.contains(&stream_of(source))
}

/// What a template writes around messages.
#[derive(Debug, PartialEq)]
struct Turns {
    before_system: String,
    after_system: String,
    without_system: String,
    before_user: String,
    between: String,
    generation: String,
    after_assistant: String,
}

/// Takes a template apart; none where what it writes around a message depends on more than who speaks. `begin`, which
/// Ollama puts before the whole text, is left out there.
fn turns(template: &Template, begin: &str) -> Option<Turns> {
    // Letters alone, so that no template trims or splits them.
    let [system, one, answer, two] = ["SYSTEMXQZ", "FIRSTXQZ", "ANSWERXQZ", "SECONDXQZ"];
    let message = |role: &str, content: &str| json!({ "role": role, "content": content });
    let turns = [message("user", one), message("assistant", answer), message("user", two)];
    let render = |messages: &[Value]| {
        let text = template.render(messages, None, Ending::GenerationPrompt, &Map::new()).ok()?.text;
        Some(text.strip_prefix(begin).unwrap_or(&text).to_string())
    };
    let plain = render(&turns)?;
    let [start, between, end, generation] = parts(&plain, [one, answer, two])?;
    let mut with_system = vec![message("system", system)];
    with_system.extend(turns);
    let (before_system, system_end) = match render(&with_system) {
        Some(text) => {
            let (before, rest) = text.split_once(system)?;
            let [after, again, other_end, last] = parts(rest, [one, answer, two])?;
            if (again, other_end, last) != (between, end, generation) {
                return None;
            }
            (before.to_string(), after.to_string())
        }
        // Some templates know no system message.
        None => (String::new(), start.to_string()),
    };
    let before_user = common_end(common_end(start, end), &system_end);
    let without = |text: &str| text[..text.len() - before_user.len()].to_string();
    let turns = Turns {
        before_system,
        after_system: without(&system_end),
        without_system: without(start),
        before_user: before_user.to_string(),
        between: between.to_string(),
        generation: generation.to_string(),
        after_assistant: without(end),
    };
    let clean = |it: &&String| !it.contains("{{") && !it.contains("\"\"\"") && !it.contains("XQZ");
    turns.texts().iter().all(clean).then_some(turns)
}

/// What stands around three texts, in this order.
fn parts<'a>(text: &'a str, at: [&str; 3]) -> Option<[&'a str; 4]> {
    let (a, rest) = text.split_once(at[0])?;
    let (b, rest) = rest.split_once(at[1])?;
    let (c, d) = rest.split_once(at[2])?;
    Some([a, b, c, d])
}

fn common_end<'a>(a: &'a str, b: &str) -> &'a str {
    let same = a.chars().rev().zip(b.chars().rev()).take_while(|(a, b)| a == b);
    &a[a.len() - same.map(|(it, _)| it.len_utf8()).sum::<usize>()..]
}

impl Turns {
    fn texts(&self) -> [&String; 7] {
        [
            &self.before_system,
            &self.after_system,
            &self.without_system,
            &self.before_user,
            &self.between,
            &self.generation,
            &self.after_assistant,
        ]
    }

    /// The template in Go's language.
    fn go(&self) -> String {
        let (with, without) = (&self.before_system, &self.without_system);
        let before_user = &self.before_user;
        let last = "{{ if eq (len (slice $.Messages $i)) 1 }}";
        let user = match self.between == self.generation {
            true => self.between.clone(),
            false => format!("{last}{}{{{{ else }}}}{}{{{{ end }}}}", self.generation, self.between),
        };
        let system = match self.before_system.is_empty() && self.after_system == self.without_system {
            true => without.clone(),
            false => {
                let after = &self.after_system;
                format!(
                    "{{{{ if .System }}}}{with}{{{{ .System }}}}{after}{{{{ else }}}}{without}{{{{ end }}}}"
                )
            }
        };
        format!(
            "{system}{{{{ range $i, $_ := .Messages }}}}{{{{ if eq .Role \"user\" }}}}{before_user}{{{{ .Content }}}}{user}\
             {{{{ else if eq .Role \"assistant\" }}}}{{{{ .Content }}}}{last}{{{{ else }}}}{}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}",
            self.after_assistant
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn template(source: &str) -> Template {
        let special =
            [("bos_token".to_string(), "<s>".to_string()), ("eos_token".to_string(), "</s>".to_string())];
        Template::new("test", source, &BTreeMap::from(special)).unwrap()
    }

    const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

    #[test]
    fn a_template_comes_apart() {
        let template = template(CHATML);
        let stops = ["<|im_end|>".to_string()];
        let modelfile = Modelfile {
            from: "./m.gguf",
            adapter: Some("./a.gguf"),
            stops: &stops,
            template: Some(&template),
            begin: "",
        };
        assert_eq!(
            modelfile.text(),
            "FROM ./m.gguf\nADAPTER ./a.gguf\nPARAMETER stop \"<|im_end|>\"\nTEMPLATE \"\"\"{{ if .System }}<|im_start|>system\n\
             {{ .System }}<|im_end|>\n{{ else }}{{ end }}{{ range $i, $_ := .Messages }}{{ if eq .Role \"user\" }}<|im_start|>user\n\
             {{ .Content }}<|im_end|>\n<|im_start|>assistant\n{{ else if eq .Role \"assistant\" }}{{ .Content }}\
             {{ if eq (len (slice $.Messages $i)) 1 }}{{ else }}<|im_end|>\n{{ end }}{{ end }}{{ end }}\"\"\"\n"
        );
    }

    #[test]
    fn what_begins_a_text_is_left_to_ollama() {
        let source = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}\
            {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}";
        let go = turns(&template(source), "<s>").unwrap().go();
        assert!(go.contains("}}[INST] {{ .Content }} [/INST]") && !go.contains("<s>"), "{go}");
        assert!(go.contains("{{ else }}</s>{{ end }}"), "{go}");
        // Before each turn of the person, as Llama 2 has it.
        let source = source.replace("{{ bos_token }}{%", "{%").replace("[INST]", "<s>[INST]");
        let go = turns(&template(&source), "<s>").unwrap().go();
        assert!(go.starts_with("{{ if .System }}"), "{go}");
        assert!(go.contains("}}[INST] {{ .Content }}") && go.contains("{{ else }}</s><s>{{ end }}"), "{go}");
    }

    #[test]
    fn templates_that_ollama_knows_are_left_to_it() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../../shared/data/ollama_template/template/index.json");
        let Ok(text) = std::fs::read_to_string(&path) else {
            eprintln!("skipped: {} is not there", path.display());
            return;
        };
        let index: Vec<Value> = serde_json::from_str(&text).unwrap();
        assert_eq!(index.len(), KNOWN.len());
        for entry in &index {
            assert!(is_known(&template(entry["template"].as_str().unwrap())), "{}", entry["name"]);
        }
        assert!(!is_known(&template(CHATML)));
    }
}
