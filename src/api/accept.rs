//! The accept loop. axum's own has no limits for headers that never end, idle connections and their number.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{Sleep, sleep, timeout};
use tower_service::Service;

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
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER).max_headers(128);
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
                // Finding out which version a client speaks has no time limit; without TLS it is the first.
                None => connection(builder.http1_only(), stream, router, peer, watcher).await,
                Some(tls) => {
                    let Ok(Ok(stream)) = timeout(HEADER, tls.0.accept(stream)).await else { return };
                    let second = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                    let builder = if second { builder.http2_only() } else { builder.http1_only() };
                    connection(builder, stream, router, peer, watcher).await;
                }
            }
            drop(permit);
        });
    }
    drop(listener);
    let _ = timeout(DRAIN, graceful.shutdown()).await;
}

async fn connection<S>(builder: Builder<TokioExecutor>, stream: S, router: Router, peer: SocketAddr, watcher: Watcher)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = Awaited { stream, first: Some(Box::pin(sleep(HEADER))) };
    // A layer would copy the whole router for every connection.
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        router.clone().call(request)
    });
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    let _ = watcher.watch(connection).await;
}

/// A connection whose first byte must come in time: hyper's limits count from it.
struct Awaited<S> {
    stream: S,
    first: Option<Pin<Box<Sleep>>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Awaited<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let Some(first) = &mut self.first else { return read };
        if read.is_ready() {
            self.first = None;
            return read;
        }
        ready!(first.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Awaited<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
