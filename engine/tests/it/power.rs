//! Power cuts at every disk operation.
