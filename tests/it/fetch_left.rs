//! Downloads that somebody leaves, or that break off.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use darkroom::fetch::{Credentials, Progress, Reference};

use crate::fetch::{Bench, content, ranged};
use crate::fixtures::weights;
use crate::service::until;
use crate::site::{Reply, Site};

#[test]
fn what_broke_off_stays_within_the_caches_bound() {
    let half = weights().len() / 2;
    let site = Site::serve(move |request| match (request.header("range"), request.path.starts_with("/plain")) {
        (Some(_), _) => ranged(request, &weights(), "\"a\""),
        (None, true) => Reply::ok(&weights()).cut(half),
        (None, false) => Reply::new("200 OK", &[("ETag", "\"a\"")], &weights()).cut(half),
    });
    let once = |bound: usize| Bench::with(|options| (options.cache_bytes, options.limits.attempts) = (bound as u64, 1));
    let bench = once(weights().len() * 2);
    for i in 0..8 {
        bench.refused(&site.url(&format!("/{i}.safetensors")));
    }
    // A part and its notes for each of those that there is room for. Who downloaded may be at it still.
    until("four of eight halves stay", 10, || bench.files("partial") == 8);
    assert_eq!(content(&bench.get(&site.url("/7.safetensors")).unwrap()), weights());
    assert!(site.requests().last().unwrap().header("range").is_some(), "it went on where it was");
    // Without a mark nobody can go on with it.
    let bench = once(1 << 30);
    bench.refused(&site.url("/plain.safetensors"));
    until("what nobody can go on with goes", 10, || bench.files("partial") == 0);
    // Whoever leaves is heard as well: there is no room for what was written, be it how little.
    let slow = Site::serve(|_| {
        Reply::new("200 OK", &[("ETag", "\"a\"")], &weights()).slowly(weights().len() / 8, Duration::from_millis(30))
    });
    let bench = once(1);
    let leaves = |progress: Progress| {
        if progress.done > 2000 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let left =
        bench.fetcher.get_blocking(&Reference::parse(&slow.url("/slow.safetensors")).unwrap(), &Credentials::default(), leaves);
    assert_eq!(left.unwrap_err().code(), "cancelled");
    until("what there is no room for goes", 10, || bench.files("partial") == 0);
}

/// Threads that share a download, of which the one that began it leaves: its clocks and sockets are not the other's loss.
#[test]
fn a_download_outlives_the_thread_that_began_it() {
    let site = Site::serve(|_| Reply::ok(&weights()).slowly(weights().len() / 40, Duration::from_millis(50)));
    let bench = Bench::new();
    let reference = Reference::parse(&site.url("/slow.safetensors")).unwrap();
    let joined = AtomicBool::new(false);
    let get = |leaves: bool| {
        let told = |_: Progress| {
            joined.fetch_or(!leaves, Ordering::SeqCst);
            if leaves && joined.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        bench.fetcher.get_blocking(&reference, &Credentials::default(), told)
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(|| get(true).err().unwrap().code());
        until("it has begun", 10, || !site.requests().is_empty());
        let second = scope.spawn(|| content(&get(false).unwrap()));
        assert_eq!(first.join().unwrap(), "cancelled");
        assert!(second.join().unwrap() == weights());
    });
    assert_eq!(site.requests().len(), 1);
}
