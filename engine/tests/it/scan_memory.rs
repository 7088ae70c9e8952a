//! What scans take of the heap, however many there are at once and however large the values.

use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use futures_util::future::join_all;
use torc_engine::{Options, ScanFrom, ScanLimits, Store};
use torc_env::Token;
use torc_sim::SimEnv;

use crate::support::{TREE, put, scan_all, value};
use crate::table_support::noise;

const SCANS: usize = 48;
const BUDGET: usize = 4 << 20;
/// Of each scan beside that: its future, its keys, the rest of a chunk, and a window that the record which came out of it last
/// keeps while the next one is read.
const BESIDE: usize = SCANS * (64 << 10);

/// Counts what a future has on the heap.
struct Counted<F> {
    future: Pin<Box<F>>,
    bytes: i64,
    most: i64,
}

impl<F: Future> Counted<F> {
    fn new(future: F) -> Counted<F> {
        Counted {
            future: Box::pin(future),
            bytes: 0,
            most: 0,
        }
    }
}

impl<F: Future> Future for Counted<F> {
    /// What it returns, and the most that it had at a time.
    type Output = (F::Output, i64);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut polled = Poll::Pending;
        let future = self.future.as_mut();
        let counted = allocation_counter::measure(|| polled = future.poll(context));
        let most = i64::try_from(counted.bytes_max).unwrap();
        self.most = self.most.max(self.bytes + most);
        self.bytes += counted.bytes_current;
        let most = self.most;
        polled.map(|output| (output, most))
    }
}

async fn filled(
    env: &SimEnv,
    options: &Options,
    value_bytes: usize,
    records: u64,
) -> Store<SimEnv> {
    let (store, _) = Store::open(env.clone(), options.clone()).await.unwrap();
    for number in 0..records {
        let record = value(noise(number, value_bytes), 1);
        put(&store, number.to_be_bytes(), record).await.unwrap();
        if number % (records / 3) == 0 {
            store.flush().await.unwrap();
        }
    }
    store.flush().await.unwrap();
    store
}

/// All of a store by pages, whose records are let go of as they come; their number.
async fn scan(store: &Store<SimEnv>, limits: ScanLimits) -> usize {
    let mut from = Some(ScanFrom::Token(Token(0)));
    let mut found = 0;
    while let Some(start) = from {
        let page = store.scan(TREE, start, Token::MAX, limits).await.unwrap();
        let bytes = page.entries.iter().map(|one| one.record.value.len());
        assert!(page.entries.len() == 1 || bytes.sum::<usize>() <= limits.bytes);
        found += page.entries.len();
        from = page.next;
    }
    found
}

#[test]
fn scans_take_no_more_than_their_budget_whatever_they_read() {
    // In blobs, and in blocks, of which each is as large as its value.
    for (value_bytes, separate_from, blocks) in [
        (256 << 10, Some(8 << 10), 0),
        (20 << 10, Some(8 << 10), 0),
        (1000, Some(8 << 10), 0),
        (20 << 10, None, SCANS * 4 * 2 * (20 << 10)),
    ] {
        torc_sim::run(1, move |env| async move {
            let records = u64::try_from((12 << 20) / value_bytes.max(4000)).unwrap();
            let options = Options {
                scan_bytes_max: BUDGET,
                separate_from,
                cache_bytes: 0,
                ..Options::new("shard-00")
            };
            let store = filled(&env, &options, value_bytes, records).await;
            let runs = store.stats().runs_max;
            assert!(runs >= 3, "{runs}");
            let limits = ScanLimits {
                records: 100,
                bytes: 1 << 20,
            };
            let expected = usize::try_from(records).unwrap();
            // Until scans have paid for a merge, and it has been made beside them.
            while store.stats().counts.compactions == 0 {
                let scans = join_all((0..SCANS).map(|_| scan(&store, limits)));
                let (found, most) = Counted::new(pin!(scans)).await;
                assert!(found.iter().all(|found| *found == expected));
                let bound = i64::try_from(BUDGET + blocks + BESIDE).unwrap();
                assert!(most <= bound, "{most} bytes for values of {value_bytes}");
            }
            assert_eq!(scan_all(&store, 10).await.len(), expected);
        });
    }
}
