//! No bytes make the parsers of a table panic, also behind a checksum that fits.

use bytes::Bytes;
use torc_env::{Token, TreeId};
use torc_sim::fuzz::fuzz;

use super::block::Block;
use super::block_builder::BlockBuilder;
use super::body;
use super::elias_fano::EliasFano;
use super::fence::{FenceBuilder, Fences};
use super::filter::{FilterBits, FilterBuilder, Filters};
use super::format::{BLOCK_ALIGN, BLOCK_HEADER_BYTES, FOOTER_BYTES, Footer, checksum};
use super::format_tests::bytes_on_page;
use crate::crypt::Keys;
use crate::record::{EntryRef, Kind, ScanFrom};

const TREE: TreeId = TreeId(7);
const FILE: u64 = 42;

fn tokens() -> Vec<Token> {
    let keys = (0..40u32).map(|number| Token::of(TREE, &number.to_le_bytes()));
    let mut tokens: Vec<Token> = keys.collect();
    tokens.sort_unstable();
    tokens
}

/// Bodies of blocks: with all columns, and with as few as possible.
fn bodies() -> Vec<Vec<u8>> {
    let tokens = tokens();
    let build = |stamps: u64, expiry: u64, stored_tokens: bool| {
        let mut builder = BlockBuilder::new(TREE);
        for (number, token) in (0..).zip(&tokens) {
            let key = format!("key of some length {number}");
            let token = if stored_tokens {
                *token
            } else {
                Token::of(TREE, key.as_bytes())
            };
            builder.push(
                &EntryRef {
                    token,
                    key: key.as_bytes(),
                    seqno: number * stamps,
                    kind: if number % 5 == 4 {
                        Kind::Tombstone
                    } else {
                        Kind::Value
                    },
                    stamp: number * stamps,
                    expires_at_ms: expiry,
                    value: if number % 5 == 4 { b"" } else { b"some value" },
                },
                false,
            );
            if !stored_tokens {
                break;
            }
        }
        let mut body = Vec::new();
        builder.encode(builder.len(), &mut body);
        body
    };
    vec![
        build(1 << 40, 99, true),
        build(0, 0, true),
        build(3, 0, false),
    ]
}

#[test]
fn no_bytes_make_a_block_panic() {
    let valid: Vec<Vec<u8>> = bodies()
        .into_iter()
        .map(|body| [&40u32.to_le_bytes()[..], &body].concat())
        .collect();
    fuzz("block", &valid, |input| {
        let Some((count, body)) = input.split_at_checked(4) else {
            return;
        };
        let count = u32::from_le_bytes(count.try_into().expect("four bytes"));
        let count = usize::try_from(count).expect("32 bits");
        for (codec, raw_len) in [(0, body.len()), (1, body.len() * 3), (2, 1)] {
            let mut stored = body.to_vec();
            let header = body::finish((FILE, 64), codec, &mut stored, raw_len, count, None);
            let bytes = Bytes::from([&header[..], body].concat());
            assert!(bytes.len() >= BLOCK_HEADER_BYTES);
            let Ok(block) = Block::decode(&bytes, (FILE, 64), TREE, None) else {
                continue;
            };
            for index in [0, block.len() / 2, block.len().saturating_sub(1)] {
                if index < block.len() {
                    let entry = block.entry(index).map(|(entry, _)| entry);
                    let from = entry.map(|entry| ScanFrom::After(entry.token, entry.key));
                    if let Ok(from) = from {
                        drop(block.seek(&from));
                    }
                    block.seqno(index);
                    drop(block.record(index));
                }
            }
            for token in [Token(0), Token(1 << 127), Token::MAX] {
                drop(block.find(token, b"key"));
            }
        }
    });
}

#[test]
fn no_bytes_make_fences_panic() {
    let tokens = tokens();
    let end = u64::try_from(tokens.len()).expect("a few") * 3 * BLOCK_ALIGN;
    let build = |close: u32| {
        let mut builder = FenceBuilder::default();
        let mut before = None;
        for (number, token) in (0..).zip(&tokens) {
            let token = Token(token.0 >> close | number);
            builder.push(
                before,
                token,
                u64::try_from(number).expect("a few") * 3 * BLOCK_ALIGN,
            );
            before = Some(token);
        }
        builder.encode()
    };
    let blocks = u64::try_from(tokens.len()).expect("a few");
    fuzz("fences", &[build(0), build(60), build(110)], |input| {
        let Ok(fences) = Fences::decode(input, blocks, end) else {
            return;
        };
        for token in tokens.iter().chain(&[Token(0), Token::MAX]) {
            if let Some(index) = fences.find(*token) {
                let extent = fences.extent(index);
                assert!(extent.offset < end);
                fences.block_at(extent.offset);
                fences.range(index);
            }
        }
    });
}

#[test]
fn no_bytes_make_a_list_panic() {
    let build = |step: u128| {
        let values: Vec<u128> = (0..90).map(|number| number * step).collect();
        let mut bytes = Vec::new();
        EliasFano::build(&values).encode(&mut bytes);
        bytes
    };
    fuzz(
        "list",
        &[build(0), build(1), build(77), build(1 << 90)],
        |input| {
            let Ok((list, len)) = EliasFano::decode(input) else {
                return;
            };
            assert!(len <= input.len());
            for index in 0..list.len() {
                list.get(index);
            }
            for value in [0, 1, 1 << 64, u128::MAX] {
                assert!(
                    list.predecessor(value)
                        .is_none_or(|index| index < list.len())
                );
            }
        },
    );
}

#[test]
fn no_bytes_make_filters_panic() {
    let tokens = tokens();
    let build = |bits| {
        let mut builder = FilterBuilder::new(bits);
        for token in &tokens {
            builder.push(*token);
        }
        builder.encode()
    };
    let valid = [build(FilterBits::Eight), build(FilterBits::Sixteen)];
    fuzz("filters", &valid, |input| {
        if let Ok(filters) = Filters::decode(input) {
            for token in tokens.iter().chain(&[Token(0), Token::MAX]) {
                filters.may_contain(*token);
            }
        }
    });
}

#[test]
fn no_bytes_make_a_footer_panic() {
    let page = bytes_on_page();
    let footer = page[page.len() - FOOTER_BYTES..].to_vec();
    let bytes = u64::try_from(page.len()).expect("a page");
    fuzz("footer", &[footer], |input| {
        let mut sector = [0; FOOTER_BYTES];
        let len = input.len().min(FOOTER_BYTES);
        sector[..len].copy_from_slice(&input[..len]);
        drop(Footer::decode(&sector, FILE, bytes, &Keys::default()));
        let footer_at = bytes - u64::try_from(FOOTER_BYTES).expect("a sector");
        let fits = checksum(FILE, footer_at, &[&sector[12..]]);
        sector[8..12].copy_from_slice(&fits.to_le_bytes());
        drop(Footer::decode(&sector, FILE, bytes, &Keys::default()));
    });
}
