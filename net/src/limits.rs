//! Every bound of the network shell, with unit and reason. Full means: refuse early, by name.

use std::time::Duration;

use torc_cluster::api::VALUE_BYTES_MAX;

/// The longest HTTP request head (request line and headers), in bytes. Keys take at most 3 KiB of it
/// (1024 bytes, percent-encoded), a context or session token the rest.
pub const HEAD_BYTES_MAX: usize = 16 << 10;
/// The most HTTP headers of a request.
pub const HEADERS_MAX: usize = 64;
/// The largest JSON body of one write, in bytes: a value of which every byte is escaped as `\u00xx`
/// takes six times its size.
pub const JSON_BODY_BYTES_MAX: usize = 6 * VALUE_BYTES_MAX + (64 << 10);
/// The largest body of a batch, in bytes.
pub const BATCH_BODY_BYTES_MAX: usize = 16 << 20;
/// The largest body of an admin request, in bytes.
pub const ADMIN_BODY_BYTES_MAX: usize = 64 << 10;
/// The largest body that is read and thrown away, so that the client gets to read why it was
/// refused instead of a reset connection, in bytes.
pub const DISCARD_BYTES_MAX: u64 = 64 << 20;
/// The longest line of a chunked body (size and extensions, or a trailer), in bytes.
pub const CHUNK_LINE_BYTES_MAX: usize = 1 << 10;
/// The deepest nesting of a JSON body. The deepest one that means something has four levels.
pub const JSON_DEPTH_MAX: usize = 16;
/// The most values of a JSON body, counted by its commas, colons and brackets: a batch of a thousand
/// operations of a dozen fields each, twice over. Bounds the parser's memory.
pub const JSON_MARKS_MAX: usize = 64 << 10;

/// The most arguments of a RESP command: `MSET` of eight thousand keys.
pub const RESP_ARGUMENTS_MAX: usize = 16 << 10;
/// The longest inline RESP command, in bytes.
pub const RESP_INLINE_BYTES_MAX: usize = 16 << 10;
/// The longest name that a RESP client gives its connection, in bytes.
pub const CLIENT_NAME_BYTES_MAX: usize = 255;
/// The most bytes of one RESP command's arguments together.
pub const RESP_COMMAND_BYTES_MAX: usize = 16 << 20;

/// Requests of one connection that one tick may start.
pub const TICK_OPERATIONS_MAX: usize = 64;
/// Bytes of requests of one connection that one tick may start.
pub const TICK_BYTES_MAX: usize = 256 << 10;
/// Requests of one connection that may be under way.
pub const PIPELINE_OPERATIONS_MAX: usize = 256;
/// Bytes that the answers of one connection's requests under way may come to, going by those before them.
pub const PIPELINE_ANSWER_BYTES_MAX: usize = 8 << 20;
/// Answer bytes of one connection above which nothing more is received from it.
pub const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Answers up to this size are copied together into one send; larger ones are sent from where they
/// are, in bytes.
pub const COALESCE_BYTES_MAX: usize = 16 << 10;
/// Bytes that one receive asks for.
pub const RECEIVE_BYTES: usize = 16 << 10;

/// Client connections of one shard when the configuration does not say.
pub const CONNECTIONS_MAX_DEFAULT: usize = 10_000;
/// A connection without a request is closed after this time.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(300);
/// A request must be received whole within this time of its first byte, plus
/// [`SLOW_BYTES_PER_SECOND`]'s allowance: slow senders hold memory.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The slowest pace that extends [`REQUEST_TIMEOUT`].
pub const SLOW_BYTES_PER_SECOND: u64 = 64 << 10;
/// A peer that takes no answer bytes for this long is dropped.
pub const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// `timeout_ms` when the client does not say.
pub const TIMEOUT_MS_DEFAULT: u64 = 5_000;
/// The longest `timeout_ms`.
pub const TIMEOUT_MS_MAX: u64 = 60_000;
