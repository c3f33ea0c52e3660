//! The messages: Varlink (<https://varlink.org>), JSON objects that end with a NUL byte.
//!
//! Only the envelope is here. What a method takes and gives is in [`super::model`], which method is
//! what in [`super::methods`], and both in words in [`INTERFACE_TEXT`], which a test holds to them.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::CoreError;

/// The interface of the daemon.
pub const INTERFACE: &str = "io.hsmd.Control";
/// The interface that every Varlink service has.
pub const SERVICE: &str = "org.varlink.service";
/// What [`INTERFACE`] has, in Varlink's own language.
pub const INTERFACE_TEXT: &str = include_str!("io.hsmd.Control.varlink");
/// What [`SERVICE`] has.
pub const SERVICE_TEXT: &str = include_str!("org.varlink.service.varlink");

/// A longer request is refused.
pub const REQUEST_BYTES_MAX: usize = 1 << 20;
/// A client believes no reply that is longer.
pub const REPLY_BYTES_MAX: usize = 64 << 20;

/// What a client sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Interface and method, joined by a dot.
    pub method: String,
    /// By name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Map<String, Value>>,
    /// Several replies are welcome.
    #[serde(default, skip_serializing_if = "is_false")]
    pub more: bool,
    /// No reply is wanted.
    #[serde(default, skip_serializing_if = "is_false")]
    pub oneway: bool,
    /// Another protocol shall follow; never granted.
    #[serde(default, skip_serializing_if = "is_false")]
    pub upgrade: bool,
}

/// What the daemon sends.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Reply {
    /// The answer, or what the error says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Value>,
    /// Another reply to the same request follows.
    #[serde(default, skip_serializing_if = "is_false")]
    pub continues: bool,
    /// Interface and error, joined by a dot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

// The shape that serde asks for.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_false(flag: &bool) -> bool {
    !*flag
}

impl Reply {
    /// The last reply of a request.
    pub fn last(parameters: Value) -> Self {
        Self {
            parameters: Some(parameters),
            ..Self::default()
        }
    }

    /// One of several replies.
    pub fn continued(parameters: Value) -> Self {
        Self {
            continues: true,
            ..Self::last(parameters)
        }
    }
}

/// The bytes of a message, its NUL included.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, serde_json::Error> {
    let mut bytes = serde_json::to_vec(message)?;
    bytes.push(0);
    Ok(bytes)
}

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The bytes are no request.
    #[error("the request is not understood: {0}")]
    Malformed(String),
    /// There is no such interface.
    #[error("there is no interface {0}")]
    InterfaceNotFound(String),
    /// There is no such method.
    #[error("there is no method {0}")]
    MethodNotFound(String),
    /// A parameter is missing or wrong.
    #[error("parameter {parameter}: {why}")]
    InvalidParameter {
        /// Its name.
        parameter: String,
        /// What is wrong.
        why: String,
    },
    /// The method gives several replies, and the request did not say `more`.
    #[error("{0} gives several replies: set \"more\" in the request")]
    ExpectedMore(&'static str),
    /// The peer may not ask that.
    #[error("{0}")]
    PermissionDenied(String),
    /// Too many connections.
    #[error("{0}")]
    Busy(String),
    /// The daemon's own answer.
    #[error(transparent)]
    Core(#[from] CoreError),
}

impl From<tierfs::catalog::Error> for Failure {
    fn from(error: tierfs::catalog::Error) -> Self {
        Self::Core(error.into())
    }
}

impl From<replay::Error> for Failure {
    fn from(error: replay::Error) -> Self {
        Self::Core(error.into())
    }
}

impl Failure {
    /// The full name of the error.
    pub fn name(&self) -> String {
        let (interface, name) = match self {
            Self::Malformed(_) | Self::InvalidParameter { .. } => (SERVICE, "InvalidParameter"),
            Self::InterfaceNotFound(_) => (SERVICE, "InterfaceNotFound"),
            Self::MethodNotFound(_) => (SERVICE, "MethodNotFound"),
            Self::ExpectedMore(_) => (SERVICE, "ExpectedMore"),
            Self::PermissionDenied(_) => (INTERFACE, "PermissionDenied"),
            Self::Busy(_) => (INTERFACE, "Busy"),
            Self::Core(CoreError::NotWatched { .. }) => (INTERFACE, "NotWatched"),
            Self::Core(CoreError::NotFound(_)) => (INTERFACE, "NotFound"),
            Self::Core(CoreError::Unavailable(_)) => (INTERFACE, "Unavailable"),
            Self::Core(CoreError::Cancelled(_)) => (INTERFACE, "Cancelled"),
            Self::Core(CoreError::Failed(_)) => (INTERFACE, "Failed"),
        };
        format!("{interface}.{name}")
    }

    /// The reply that says it. Every error has a `message` for people.
    pub fn reply(&self) -> Reply {
        let mut parameters = json!({ "message": self.to_string() });
        let named = match self {
            Self::Malformed(_) => Some(("parameter", "(request)")),
            Self::InterfaceNotFound(name) => Some(("interface", name.as_str())),
            Self::MethodNotFound(name) => Some(("method", name.as_str())),
            Self::InvalidParameter { parameter, .. } => Some(("parameter", parameter.as_str())),
            _ => None,
        };
        if let Some((key, name)) = named {
            parameters[key] = json!(name);
        }
        Reply {
            parameters: Some(parameters),
            continues: false,
            error: Some(self.name()),
        }
    }
}

/// Reads a request; the bytes without the NUL.
pub fn parse_request(bytes: &[u8]) -> Result<Request, Failure> {
    let request: Request =
        serde_json::from_slice(bytes).map_err(|error| Failure::Malformed(error.to_string()))?;
    if request.upgrade {
        return Err(Failure::Malformed("upgrade is not supported".to_owned()));
    }
    Ok(request)
}

/// Reads a method's parameters.
pub fn parameters<T: DeserializeOwned>(request: &Request) -> Result<T, Failure> {
    let map = request.parameters.clone().unwrap_or_default();
    serde_json::from_value(Value::Object(map)).map_err(|error| {
        let why = error.to_string();
        // serde names the field where it is missing or twice there.
        let named = why
            .split("field `")
            .nth(1)
            .and_then(|rest| rest.split('`').next());
        let parameter = named.unwrap_or("(parameters)").to_owned();
        Failure::InvalidParameter { parameter, why }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Asked {
        #[allow(dead_code)]
        path: String,
    }

    #[test]
    fn requests_are_read_and_hostile_ones_refused() {
        let request = parse_request(br#"{"method":"a.B","parameters":{"path":"x"},"more":true}"#);
        let request = request.unwrap();
        assert!(request.more && !request.oneway);
        assert_eq!(parameters::<Asked>(&request).unwrap().path, "x");
        let deep = format!(
            "{{\"method\":\"a.B\",\"parameters\":{{\"x\":{}",
            "[".repeat(100_000)
        );
        for bad in [
            "",
            "{}",
            "[]",
            "{\"method\":5}",
            "{\"method\":\"a.B\",\"parameters\":[]}",
            "{\"method\":\"a.B\",\"upgrade\":true}",
            "{\"method\":\"a.B\"} x",
            "\u{fffd}",
            &deep,
        ] {
            let failure = parse_request(bad.as_bytes()).unwrap_err();
            assert_eq!(failure.name(), "org.varlink.service.InvalidParameter");
        }
        assert!(parse_request(b"{\"method\":\"\xff\"}").is_err());
    }

    #[test]
    fn a_missing_parameter_is_named() {
        let request = parse_request(br#"{"method":"a.B"}"#).unwrap();
        let failure = parameters::<Asked>(&request).unwrap_err();
        let reply = failure.reply();
        assert_eq!(reply.parameters.unwrap()["parameter"], "path");
        assert_eq!(reply.error.unwrap(), "org.varlink.service.InvalidParameter");
    }
}
