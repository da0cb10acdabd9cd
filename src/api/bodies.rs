//! Bodies while they are in memory: how many bytes of them there may be in all, and how long one may take to come.

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

use super::problem::Problem;

/// Bytes of large bodies that are in memory, of all callers.
const MOST: usize = 1 << 30;

/// Whoever sends no more than this waits for nobody.
const SMALL: usize = 1 << 20;

/// For room in memory.
const PATIENCE: Duration = Duration::from_secs(5);

/// For a whole body to come: one that dribbles holds what has come of it.
const LONGEST: Duration = Duration::from_secs(600);

static ROOM: Semaphore = Semaphore::const_new(MOST);

/// The room that one body takes, given back when this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    room: &'static Semaphore,
    patience: Duration,
    bytes: usize,
    permit: Option<SemaphorePermit<'static>>,
}

impl Held {
    pub(super) fn none() -> Self {
        Self::in_room(&ROOM, PATIENCE)
    }

    fn in_room(room: &'static Semaphore, patience: Duration) -> Self {
        Self { room, patience, bytes: 0, permit: None }
    }

    /// So many bytes more have come.
    pub(super) async fn more(&mut self, bytes: usize) -> Result<(), Problem> {
        self.bytes += bytes;
        if self.bytes <= SMALL {
            return Ok(());
        }
        let missing = self.bytes - self.permit.as_ref().map_or(0, SemaphorePermit::num_permits);
        let missing = u32::try_from(missing).unwrap_or(u32::MAX);
        let Ok(Ok(more)) = timeout(self.patience, self.room.acquire_many(missing)).await else {
            return Err(Problem::Unavailable("Too many large bodies are being sent at once; send this one again.", 5));
        };
        match &mut self.permit {
            Some(permit) => permit.merge(more),
            None => self.permit = Some(more),
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

    #[tokio::test]
    async fn large_bodies_wait_for_room_and_small_ones_do_not() {
        static FOUR: Semaphore = Semaphore::const_new(4 << 20);
        let held = || Held::in_room(&FOUR, Duration::from_millis(50));
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
        let (mut first, mut second) = (Held::in_room(&TWO, Duration::from_secs(5)), Held::in_room(&TWO, Duration::from_secs(5)));
        first.more(2 << 20).await.unwrap();
        let waiting = tokio::spawn(async move { second.more(2 << 20).await });
        tokio::task::yield_now().await;
        drop(first);
        waiting.await.unwrap().unwrap();
    }
}
