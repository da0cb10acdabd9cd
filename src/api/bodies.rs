//! Bodies while they are in memory: how many bytes of them there may be, in all and of one tenant, and how long one may take.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::timeout;
use tracing::Instrument;

use super::problem::Problem;

/// Bytes of large bodies that are in memory, of all callers.
const MOST: usize = 1 << 30;

/// And of one tenant: many slow bodies of his keep nobody else out.
const MOST_OF_TENANT: usize = MOST / 2;

/// Whoever sends no more than this waits for nobody.
const SMALL: usize = 1 << 20;

/// For room in memory.
const PATIENCE: Duration = Duration::from_secs(5);

/// For a whole body to come: one that dribbles holds what has come of it.
const LONGEST: Duration = Duration::from_secs(600);

static ROOM: Semaphore = Semaphore::const_new(MOST);

/// What of the room is each tenant's, for as long as he has bodies.
static SHARES: Mutex<BTreeMap<String, Weak<Semaphore>>> = Mutex::new(BTreeMap::new());

fn share(tenant: &str) -> Arc<Semaphore> {
    let mut shares = SHARES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(share) = shares.get(tenant).and_then(Weak::upgrade) {
        return share;
    }
    shares.retain(|_, share| share.strong_count() > 0);
    let share = Arc::new(Semaphore::new(MOST_OF_TENANT));
    shares.insert(tenant.into(), Arc::downgrade(&share));
    share
}

/// The room that one body takes, given back when this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    room: &'static Semaphore,
    share: Arc<Semaphore>,
    patience: Duration,
    bytes: usize,
    /// Of the tenant's share, and of the room.
    permits: Option<(OwnedSemaphorePermit, SemaphorePermit<'static>)>,
}

impl Held {
    /// None yet, of a tenant's.
    pub(super) fn of(tenant: &str) -> Self {
        Self::in_room(&ROOM, share(tenant), PATIENCE)
    }

    fn in_room(room: &'static Semaphore, share: Arc<Semaphore>, patience: Duration) -> Self {
        Self { room, share, patience, bytes: 0, permits: None }
    }

    /// So many bytes more have come.
    pub(super) async fn more(&mut self, bytes: usize) -> Result<(), Problem> {
        self.bytes += bytes;
        if self.bytes <= SMALL {
            return Ok(());
        }
        let missing = self.bytes - self.permits.as_ref().map_or(0, |(_, room)| room.num_permits());
        let missing = u32::try_from(missing).unwrap_or(u32::MAX);
        let (share, room) = (self.share.clone(), self.room);
        // First the tenant's own: who waits for that stands in nobody's way.
        let both = async move {
            let own = share.acquire_many_owned(missing).await?;
            Ok::<_, AcquireError>((own, room.acquire_many(missing).await?))
        };
        let Ok(Ok((own, all))) = timeout(self.patience, both).await else {
            return Err(Problem::Unavailable("Too many large bodies are being sent at once; send this one again.", 5));
        };
        match &mut self.permits {
            Some((share, room)) => {
                share.merge(own);
                room.merge(all);
            }
            None => self.permits = Some((own, all)),
        }
        Ok(())
    }
}

/// What `reading` a body gives, if it does not take too long.
pub(super) async fn in_time<T>(reading: impl Future<Output = Result<T, Problem>>) -> Result<T, Problem> {
    within(LONGEST, reading).await
}

async fn within<T>(longest: Duration, reading: impl Future<Output = Result<T, Problem>>) -> Result<T, Problem> {
    timeout(longest, reading).await.unwrap_or(Err(Problem::Slow))
}

/// Does `work` in a task of its own, which comes to its end if the caller goes away; what it works on takes room until then.
pub(super) async fn to_the_end<T: Send + 'static>(
    held: impl Send + 'static,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, Problem> {
    let working = async move {
        let done = work.await;
        drop(held);
        done
    };
    tokio::spawn(working.in_current_span()).await.map_err(|_| Problem::Internal)
}

/// What a body or a part of a form holds, at most `most` bytes; `broken` says what it means if it cannot be read.
pub(super) async fn whole<E>(
    pieces: impl Stream<Item = Result<Bytes, E>>,
    held: &mut Held,
    most: usize,
    broken: impl Fn(E) -> Problem,
) -> Result<Vec<u8>, Problem> {
    let (mut pieces, mut bytes) = (pin!(pieces), Vec::new());
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(&broken)?;
        if bytes.len() + piece.len() > most {
            return Err(Problem::TooLarge(most));
        }
        held.more(piece.len()).await?;
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a tenant who may have all.
    fn alone() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(MOST))
    }

    #[tokio::test]
    async fn large_bodies_wait_for_room_and_small_ones_do_not() {
        static FOUR: Semaphore = Semaphore::const_new(4 << 20);
        let held = || Held::in_room(&FOUR, alone(), Duration::from_millis(50));
        let (mut first, mut second, mut small) = (held(), held(), held());
        for _ in 0..3 {
            first.more(1 << 20).await.unwrap();
        }
        let refused = second.more(2 << 20).await;
        assert!(matches!(refused, Err(Problem::Unavailable(_, 5))), "{refused:?}");
        small.more(SMALL).await.unwrap();
        drop((first, second));
        assert_eq!(FOUR.available_permits(), 4 << 20, "all of it is given back");
        held().more(4 << 20).await.unwrap();
    }

    #[tokio::test]
    async fn bodies_that_do_not_end_are_given_up() {
        let endless = std::future::pending::<Result<(), Problem>>();
        assert!(matches!(within(Duration::from_millis(20), endless).await, Err(Problem::Slow)));
        assert!(within(Duration::from_secs(5), async { Ok(1) }).await.is_ok());
    }

    #[tokio::test]
    async fn whoever_waits_for_room_gets_it() {
        static TWO: Semaphore = Semaphore::const_new(2 << 20);
        let held = || Held::in_room(&TWO, alone(), Duration::from_secs(5));
        let (mut first, mut second) = (held(), held());
        first.more(2 << 20).await.unwrap();
        let waiting = tokio::spawn(async move { second.more(2 << 20).await });
        tokio::task::yield_now().await;
        drop(first);
        waiting.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_tenant_leaves_room_for_others() {
        static FOUR: Semaphore = Semaphore::const_new(4 << 20);
        let held = |share: &Arc<Semaphore>| Held::in_room(&FOUR, share.clone(), Duration::from_millis(50));
        let (one, other) = (Arc::new(Semaphore::new(2 << 20)), Arc::new(Semaphore::new(2 << 20)));
        let (mut first, mut others) = (held(&one), held(&other));
        first.more(2 << 20).await.unwrap();
        let refused = held(&one).more(2 << 20).await;
        assert!(matches!(refused, Err(Problem::Unavailable(_, 5))), "{refused:?}");
        others.more(2 << 20).await.unwrap();
        drop(first);
        held(&one).more(2 << 20).await.unwrap();
    }

    #[test]
    fn a_tenants_bodies_have_one_share_while_there_are_any() {
        let (first, second) = (Held::of("mine"), Held::of("mine"));
        assert!(Arc::ptr_eq(&first.share, &second.share) && !Arc::ptr_eq(&first.share, &share("yours")));
        drop((first, second));
        let _new = Held::of("another's");
        assert!(!SHARES.lock().unwrap().contains_key("mine"), "and nothing is left of it");
    }

    #[tokio::test]
    async fn room_stays_taken_when_the_caller_goes_away() {
        static TWO: Semaphore = Semaphore::const_new(2 << 20);
        let mut held = Held::in_room(&TWO, alone(), Duration::from_secs(5));
        held.more(2 << 20).await.unwrap();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        let work = async move { ended.await.unwrap() };
        assert!(timeout(Duration::from_millis(20), to_the_end(held, work)).await.is_err());
        assert_eq!(TWO.available_permits(), 0);
        end.send(()).unwrap();
        drop(timeout(Duration::from_secs(5), TWO.acquire_many(2 << 20)).await.unwrap().unwrap());
    }
}
