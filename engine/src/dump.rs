//! Hexdumps for the pages under `docs/formats/`, which tests hold against what the code writes.

/// Sixteen bytes a line; runs of lines that are all zero are left out, as `*`.
pub(crate) fn dump(bytes: &[u8]) -> String {
    let mut out = String::new();
    let mut is_skipping = false;
    for (index, line) in bytes.chunks(16).enumerate() {
        if line.iter().all(|byte| *byte == 0) {
            if !is_skipping {
                out.push_str("*\n");
            }
            is_skipping = true;
            continue;
        }
        is_skipping = false;
        out.push_str(&format!("{:04x} ", index * 16));
        for byte in line {
            out.push_str(&format!(" {byte:02x}"));
        }
        out.push('\n');
    }
    out.push_str(&format!("{:04x}\n", bytes.len()));
    out
}

/// Fails, and prints the dump, when a page does not have it.
pub(crate) fn assert_on_page(page: &str, name: &str, bytes: &[u8]) {
    let dump = dump(bytes);
    assert!(
        page.contains(&dump),
        "docs/formats/{name} lacks this dump (a change of it is a change of format):\n{dump}"
    );
}
