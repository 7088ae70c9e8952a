//! What goes wrong between a client and a node.

use std::io;
use std::net::SocketAddr;

use crate::answer::Failure;
use crate::wire::frame::FrameError;
use crate::wire::handshake::{HandshakeError, Status};
use crate::wire::message::MessageError;

/// Why there is no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No connection came about: nothing was sent.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The node does not want the connection.
    #[error("the node refuses the connection: {status:?}")]
    Refused {
        /// Why.
        status: Status,
    },
    /// The other side speaks something else.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// The connection broke. A request that was sent may have been carried out.
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    /// The other side sent bytes that are no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The other side sent a frame that holds no answer.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The node answered with something that was not asked for.
    #[error("the node answered {found} to a {asked}")]
    Unexpected {
        /// What was asked.
        asked: &'static str,
        /// What came.
        found: &'static str,
    },
    /// The node answered that it did not work.
    #[error("{0}")]
    Failed(Failure),
}

impl ClientError {
    /// Whether a write that ended like this may have been carried out all the same.
    pub fn in_doubt(&self) -> bool {
        match self {
            ClientError::Connect { .. }
            | ClientError::Refused { .. }
            | ClientError::Handshake(_) => false,
            ClientError::Broken(_)
            | ClientError::Frame(_)
            | ClientError::Message(_)
            | ClientError::Unexpected { .. } => true,
            ClientError::Failed(failure) => failure.in_doubt,
        }
    }

    /// Whether the connection is of no use any more.
    pub(crate) fn is_fatal(&self) -> bool {
        !matches!(self, ClientError::Failed(_) | ClientError::Connect { .. })
    }
}
