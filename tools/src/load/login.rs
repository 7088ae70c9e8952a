//! Who the load is to a server that asks for a password.
//!
//! A password comes from a file or from the environment, and so is never in a list of processes, in a shell's history
//! or in a result, which holds the command line.

use std::fmt;
use std::path::Path;

use crate::failure::Failure;

/// Where a password is looked for when no file is given.
pub const PASSWORD_VARIABLE: &str = "TORC_LOAD_PASSWORD";

/// A user, who may be the server's default one, and a password.
#[derive(Clone)]
pub struct Login {
    /// The user's name.
    pub user: Option<String>,
    /// In the clear.
    pub password: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Login of {:?}", self.user)
    }
}

impl Login {
    /// With the first line of a file, or what the environment has. `None` where there is neither and nobody is named.
    pub fn find(user: Option<&str>, file: Option<&Path>) -> Result<Option<Self>, Failure> {
        let password = match file {
            Some(path) => {
                let fail = |why: &dyn fmt::Display| {
                    Failure::new(format!("--password-file {}: {why}", path.display()))
                };
                let text = std::fs::read_to_string(path).map_err(|error| fail(&error))?;
                let line = text.lines().next().unwrap_or_default().to_owned();
                if line.is_empty() {
                    return Err(fail(&"its first line is empty"));
                }
                Some(line)
            }
            None => std::env::var(PASSWORD_VARIABLE).ok(),
        };
        let user = user.map(str::to_owned);
        match password {
            Some(password) => Ok(Some(Self { user, password })),
            None if user.is_some() => Err(Failure::usage(format!(
                "--user: give a password too, by --password-file or in {PASSWORD_VARIABLE}"
            ))),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_the_first_line_of_a_file_and_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        let found = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Login::find(Some("ann"), Some(&path))
        };
        for text in ["secret 1\n", "secret 1", "secret 1\r\nmore\n"] {
            let login = found(text).unwrap().unwrap();
            assert_eq!(login.password, "secret 1");
            assert!(!format!("{login:?}").contains("secret"));
        }
        for text in ["", "\nsecret\n"] {
            let words = found(text).unwrap_err().to_string();
            assert!(words.contains("first line is empty"), "{words}");
        }
        let missing = Login::find(None, Some(&dir.path().join("missing")));
        assert!(missing.unwrap_err().to_string().contains("No such file"));
    }
}
