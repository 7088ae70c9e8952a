//! How a command fails: one message on standard error and an exit status.

use std::fmt;

/// Exit status of a command that failed.
pub const EXIT_FAILED: u8 = 1;
/// Exit status of a command line that asks for what there is not.
pub const EXIT_USAGE: u8 = 2;
/// Exit status of a read that found nothing.
pub const EXIT_NOT_FOUND: u8 = 3;
/// Exit status of a load that read a wrong value or missed an acknowledged write.
pub const EXIT_UNTRUE: u8 = 4;
/// Exit status of a load that had to be VALID and was not.
pub const EXIT_INVALID: u8 = 5;

/// Why a command failed, in words for its user.
#[derive(Debug)]
pub struct Failure {
    message: String,
    exit: u8,
}

impl Failure {
    /// A failure with exit status 1.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            exit: EXIT_FAILED,
        }
    }

    /// A command line that is wrong, where the parser cannot know.
    pub fn usage(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            exit: EXIT_USAGE,
        }
    }

    /// A read that found nothing.
    pub fn not_found(what: &str) -> Self {
        Self {
            message: format!("{what}: not found"),
            exit: EXIT_NOT_FOUND,
        }
    }

    /// A store gave back something else than what was written.
    pub fn untrue(message: String) -> Self {
        Self {
            message,
            exit: EXIT_UNTRUE,
        }
    }

    /// A measurement is of the client as much as of the servers.
    pub fn invalid(message: String) -> Self {
        Self {
            message,
            exit: EXIT_INVALID,
        }
    }

    /// The failure that a node reported: its code and message, and what is known of the outcome.
    pub fn from_answer(status: u16, body: &[u8]) -> Self {
        let document: Option<serde_json::Value> = serde_json::from_slice(body).ok();
        let error = document.as_ref().and_then(|document| document.get("error"));
        let Some(error) = error else {
            let text = String::from_utf8_lossy(body);
            return Self::new(format!("status {status}: {}", text.trim()));
        };
        let text = |field| {
            error
                .get(field)
                .and_then(serde_json::Value::as_str)
                .unwrap_or("")
        };
        let flag = |field| {
            error
                .get(field)
                .and_then(serde_json::Value::as_bool)
                .unwrap_or(false)
        };
        let mut message = format!("{} ({}, status {status})", text("message"), text("code"));
        if flag("in_doubt") {
            message.push_str("; in doubt: it may have been applied");
        }
        if flag("retryable") {
            message.push_str("; it can be tried again");
        }
        Self::new(message)
    }

    /// What failed was cut short by this signal, as a shell reports it. A value that was not true stays
    /// the worse finding.
    pub fn interrupted(self, signal: u8) -> Self {
        let exit = match self.exit {
            EXIT_UNTRUE => EXIT_UNTRUE,
            _ => 128 + signal,
        };
        Self { exit, ..self }
    }

    /// The process's exit status.
    pub fn exit(&self) -> u8 {
        self.exit
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure::new(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nodes_own_words_are_passed_on() {
        let body = br#"{"error":{"code":"timeout","message":"no quorum in time","retryable":true,"in_doubt":true}}"#;
        let text = Failure::from_answer(504, body).to_string();
        assert_eq!(
            text,
            "no quorum in time (timeout, status 504); in doubt: it may have been applied; it can \
             be tried again"
        );
        assert_eq!(
            Failure::from_answer(500, b"oops").to_string(),
            "status 500: oops"
        );
    }
}
