//! The accept loop. axum's own has no limits for headers that never end, idle connections and their number.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{Peer, Tls};

/// For a request's head to arrive, and for the handshake before it.
const HEADER: Duration = Duration::from_secs(15);

/// Connections at a time; others wait to be accepted.
const CONNECTIONS: usize = 4096;

/// For open requests to end once the service stops.
const DRAIN: Duration = Duration::from_secs(60);

/// Serves connections until `stop`, then no new ones.
pub(super) async fn serve(listener: TcpListener, tls: Option<Tls>, router: Router, stop: impl Future<Output = ()>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(Duration::from_secs(30)).max_concurrent_streams(256);
    tokio::pin!(stop);
    loop {
        let permit = tokio::select! {
            permit = permits.clone().acquire_owned() => permit,
            () = &mut stop => break,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, most likely: others end first.
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let (builder, router, watcher, tls) = (builder.clone(), router.clone(), graceful.watcher(), tls.clone());
        tokio::spawn(async move {
            match tls {
                None => connection(&builder, stream, router, peer, watcher).await,
                Some(tls) => {
                    if let Ok(Ok(stream)) = timeout(HEADER, tls.0.accept(stream)).await {
                        connection(&builder, stream, router, peer, watcher).await;
                    }
                }
            }
            drop(permit);
        });
    }
    drop(listener);
    let _ = timeout(DRAIN, graceful.shutdown()).await;
}

async fn connection<S>(builder: &Builder<TokioExecutor>, stream: S, router: Router, peer: SocketAddr, watcher: Watcher)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = TowerToHyperService::new(router.layer(Extension(Peer(peer))));
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    let _ = watcher.watch(connection).await;
}
