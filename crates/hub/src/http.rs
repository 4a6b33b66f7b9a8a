//! Requests, with redirects that don't carry the token elsewhere.

use std::time::Duration;

use ureq::http::{HeaderMap, Response};
use ureq::{Agent, Body, SendBody};

use crate::name::Name;
use crate::{Error, Hub, HubOptions, Result, modelscope};

/// The longest text of a refusal that is read.
const LONGEST_REFUSAL: u64 = 1 << 16;
/// Redirects that are followed.
const MOST_REDIRECTS: usize = 10;

/// What a hub has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repository {
    Model,
    DataSet,
}

impl Repository {
    /// Where it is found below the hub's address, and below that of its questions.
    fn paths(self) -> (&'static str, &'static str) {
        match self {
            Repository::Model => ("", "models/"),
            Repository::DataSet => ("datasets/", "datasets/"),
        }
    }

    /// What may be used instead of asking the hub.
    fn instead(self) -> &'static str {
        match self {
            Repository::Model => "give the path of a folder or GGUF file that holds the model",
            Repository::DataSet => "give the path of a file or folder that holds the rows",
        }
    }
}

/// Asks one hub about one model or data set.
pub(crate) struct Client<'a> {
    hub: Hub,
    repository: Repository,
    agent: Agent,
    pub(crate) endpoint: String,
    pub(crate) token: Option<&'a str>,
    name: &'a Name,
    revision: &'a str,
}

/// What is sent.
pub(crate) enum Sent<'a> {
    Bytes(&'a [u8]),
    /// So many bytes, as they are read.
    Read(&'a mut dyn std::io::Read, u64),
}

/// How something is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Post,
    /// To an address that says by itself that one may: nobody is told who asks.
    PostSigned,
    /// The same.
    PutSigned,
}

/// An answer that isn't the one asked for, or none.
pub(crate) struct Failure {
    /// For the user.
    pub(crate) error: Error,
    /// Whether asking again may help, and after what time the server wants to be asked.
    pub(crate) again: Option<Option<Duration>>,
}

impl Failure {
    pub(crate) fn last(message: String) -> Failure {
        Failure { error: Error::new(message), again: None }
    }
}

impl<'a> Client<'a> {
    pub(crate) fn new(repository: Repository, name: &'a Name, options: &'a HubOptions) -> Result<Client<'a>> {
        let endpoint = options.endpoint.trim_end_matches('/').to_string();
        let Some(origin) = origin(&endpoint) else {
            let (variable, known) = (options.hub.endpoint_variable(), options.hub.endpoint());
            return Err(Error::new(format!(
                "{variable} is `{endpoint}`, expected an address such as {known}"
            )));
        };
        let mut config = Agent::config_builder()
            .max_redirects(0)
            .max_redirects_will_error(false)
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(20)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .timeout_per_write(Some(Duration::from_secs(60)))
            .user_agent(concat!("ferrotune/", env!("CARGO_PKG_VERSION")));
        // A server on this machine isn't reached through a proxy.
        let host = origin.rsplit_once("://").map_or("", |(_, host)| host);
        if ["localhost", "127.0.0.1", "[::1]"]
            .iter()
            .any(|it| host == *it || host.starts_with(&format!("{it}:")))
        {
            config = config.proxy(None);
        }
        let (token, revision) = (options.token.as_deref(), options.revision());
        let (hub, agent) = (options.hub, config.build().into());
        Ok(Client { hub, repository, agent, endpoint, token, name, revision })
    }

    /// Where the hub tells what a model consists of.
    pub(crate) fn listing(&self) -> String {
        if self.hub == Hub::ModelScope {
            return modelscope::listing(&self.endpoint, self.name, self.revision);
        }
        let model = escaped(&self.name.model, true);
        let (endpoint, kind) = (&self.endpoint, self.repository.paths().1);
        format!("{endpoint}/api/{kind}{model}/revision/{}?blobs=true", escaped(self.revision, false))
    }

    /// Where a file is.
    pub(crate) fn file(&self, commit: &str, path: &str) -> String {
        if self.hub == Hub::ModelScope {
            return modelscope::file(&self.endpoint, self.name, commit, path);
        }
        let model = escaped(&self.name.model, true);
        let (endpoint, kind) = (&self.endpoint, self.repository.paths().0);
        format!("{endpoint}/{kind}{model}/resolve/{}/{}", escaped(commit, false), escaped(path, true))
    }

    /// GET, from a byte on. The answer's status is 200, 206 or 416.
    pub(crate) fn get(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let mut url = url.to_string();
        for _ in 0..MOST_REDIRECTS {
            let mut request = self.agent.get(&url);
            for (name, value) in self.credentials(&url) {
                request = request.header(name, value);
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| self.unreachable(&url, &error))?;
            let status = response.status().as_u16();
            match status {
                200 | 206 | 416 => return Ok(response),
                301 | 302 | 303 | 307 | 308 => url = self.redirected(&url, response.headers())?,
                _ => return Err(self.refused(status, response.headers())),
            }
        }
        Err(Failure::last(format!("`{}`: {url} is redirected without end", self.name)))
    }

    /// Sends something. The answer's status is under 300; any other is what `refused` makes of it.
    pub(crate) fn send(
        &self,
        verb: Verb,
        url: &str,
        headers: &[(&str, &str)],
        mut body: Sent,
        refused: &dyn Fn(u16, &HeaderMap, String) -> Failure,
    ) -> Result<Response<Body>, Failure> {
        let mut url = url.to_string();
        for _ in 0..MOST_REDIRECTS {
            let mut request = match verb {
                Verb::Post | Verb::PostSigned => self.agent.post(&url),
                Verb::PutSigned => self.agent.put(&url),
            };
            // Storage answers once it has put everything together.
            request = request.config().timeout_recv_response(Some(Duration::from_secs(300))).build();
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            for (name, value) in self.credentials(&url).into_iter().filter(|_| verb == Verb::Post) {
                request = request.header(name, value);
            }
            let answer = match &mut body {
                Sent::Bytes(bytes) => request.send(*bytes),
                Sent::Read(reader, length) => {
                    request.header("Content-Length", length.to_string()).send(SendBody::from_reader(*reader))
                }
            };
            let mut response = answer.map_err(|error| self.unreachable(&url, &error))?;
            let status = response.status().as_u16();
            match (status, &body) {
                (..300, _) => return Ok(response),
                // What has been read can't be sent again. Other redirects than these would be asked for with GET.
                (307 | 308, Sent::Bytes(_)) => url = self.redirected(&url, response.headers())?,
                _ => {
                    let said = said(&mut response);
                    return Err(refused(status, response.headers(), said));
                }
            }
        }
        Err(Failure::last(format!("`{}`: {url} is redirected without end", self.name)))
    }

    /// What says who asks; nobody but the hub is told.
    fn credentials(&self, url: &str) -> Vec<(&'static str, String)> {
        let Some(token) = self.token.filter(|_| origin(url) == origin(&self.endpoint)) else {
            return Vec::new();
        };
        let mut headers = vec![("Authorization", format!("Bearer {token}"))];
        if self.hub == Hub::ModelScope {
            // Older of its questions know only this.
            headers.push(("Cookie", format!("m_session_id={token}")));
        }
        headers
    }

    fn redirected(&self, url: &str, headers: &HeaderMap) -> Result<String, Failure> {
        let wrong = |to: &str| {
            Failure::last(format!(
                "`{}`: {url} is redirected to `{to}`, which isn't followed: try another {}",
                self.name,
                self.hub.endpoint_variable()
            ))
        };
        let to = text(headers, "location").ok_or_else(|| wrong(""))?;
        let (Some(from), true) = (origin(url), to.starts_with('/') && !to.starts_with("//")) else {
            // Elsewhere; but what was asked for in secret isn't fetched in the open.
            let safe = origin(to).is_some() && (!url.starts_with("https://") || to.starts_with("https://"));
            return if safe { Ok(to.to_string()) } else { Err(wrong(to)) };
        };
        Ok(format!("{from}{to}"))
    }

    fn unreachable(&self, url: &str, error: &ureq::Error) -> Failure {
        let host = origin(url).unwrap_or_default();
        let error = Error::new(format!(
            "can't reach {host} for `{}` ({error}): check the connection or HTTPS_PROXY, set {} to \
             a mirror, or {}",
            self.name,
            self.hub.endpoint_variable(),
            self.repository.instead()
        ));
        Failure { error, again: Some(None) }
    }

    fn refused(&self, status: u16, headers: &HeaderMap) -> Failure {
        let (name, endpoint, revision) = (&self.name, &self.endpoint, self.revision);
        let code = text(headers, "x-error-code").unwrap_or("");
        let below = if self.hub == Hub::ModelScope { "models/" } else { self.repository.paths().0 };
        let page = format!("{endpoint}/{below}{}", name.model);
        let token_page = format!("{endpoint}/{}", self.hub.token_page());
        let (variable, mirror) = (self.hub.token_variable(), self.hub.endpoint_variable());
        let wait = wish(headers);
        match (status, self.token.is_some()) {
            (_, _) if code == "GatedRepo" => Failure::last(format!(
                "`{name}` is given to those who have accepted its licence: accept it at {page}, then set \
                 {variable} to a token from {token_page}"
            )),
            (401, false) => Failure::last(format!(
                "{endpoint} doesn't show `{name}` to everyone (401): check the name, or set {variable} to a \
                 token from {token_page} if it is private"
            )),
            (401, true) => Failure::last(format!(
                "{endpoint} doesn't accept the token or doesn't have `{name}` (401): check {variable} and \
                 the name"
            )),
            (403, _) => Failure::last(format!(
                "{endpoint} forbids `{name}` to this token (403): ask for access at {page}, or set {variable} \
                 to a token that may read it"
            )),
            (404, _) if code == "RevisionNotFound" => {
                Failure::last(format!("`{name}` has no revision `{revision}` at {endpoint} (404)"))
            }
            (404, _) => Failure::last(format!(
                "{endpoint} has no `{name}` at revision `{revision}` (404): check the name, or set \
                 {mirror} to the hub that has it"
            )),
            (429, _) => {
                let token = match self.token {
                    Some(_) => String::new(),
                    None => format!(", or set {variable}: known users may ask more"),
                };
                let message =
                    format!("{endpoint} is asked too much for now (429): try again in some minutes{token}");
                Failure { error: Error::new(message), again: Some(wait) }
            }
            (500.., _) => {
                let message =
                    format!("{endpoint} has trouble of its own ({status}) with `{name}`: try again later");
                Failure { error: Error::new(message), again: Some(wait) }
            }
            _ => Failure::last(format!("{endpoint} answers {status} for `{name}`, which isn't understood")),
        }
    }
}

/// A header, where it is there and readable.
pub(crate) fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// `scheme://host:port` of an address.
fn origin(url: &str) -> Option<&str> {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"))?;
    let host = rest.split(['/', '?', '#']).next().filter(|it| !it.is_empty() && !it.contains('@'))?;
    Some(&url[..url.len() - rest.len() + host.len()])
}

/// Why the server refuses, in its words: a header, `error` of its JSON, or nothing.
fn said(response: &mut Response<Body>) -> String {
    if let Some(message) = text(response.headers(), "x-error-message") {
        return message.to_string();
    }
    let body = response.body_mut().with_config().limit(LONGEST_REFUSAL).read_to_vec().unwrap_or_default();
    let json: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
    let error = json.as_ref().and_then(|it| it.get("error").or(it.get("message")));
    error.and_then(serde_json::Value::as_str).unwrap_or("").to_string()
}

/// How long the server wants to be left alone.
pub(crate) fn wish(headers: &HeaderMap) -> Option<Duration> {
    text(headers, "retry-after").and_then(|it| it.parse().ok()).map(Duration::from_secs)
}

/// A part of an address; slashes stay where `slashes` says so.
pub(crate) fn escaped(text: &str, slashes: bool) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => escaped.push(byte.into()),
            b'/' if slashes => escaped.push('/'),
            _ => escaped += &format!("%{byte:02X}"),
        }
    }
    escaped
}
