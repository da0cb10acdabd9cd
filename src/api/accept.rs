//! The accept loop. axum's own has no limits for headers that never end, idle connections and their number.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use hyper::Request;
use hyper::body::{Frame, Incoming, SizeHint};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Sleep, sleep, timeout};
use tower_service::Service;

use super::places::{Place, Places};
use super::{Peer, Tls};

/// For a request's head to arrive, and for the handshake before it.
const HEADER: Duration = Duration::from_secs(15);

/// Connections at a time; others wait to be accepted.
const CONNECTIONS: usize = 4096;

/// Connections of one address; more are closed at once, so that nobody takes the places of all.
const OF_PEER: i64 = 256;

/// For a connection without an open request. HTTP/1.1 has [`HEADER`] for that; pings keep HTTP/2 alive, whoever needs it or not.
const IDLE: Duration = Duration::from_secs(60);

/// What was asked to end and does not is cut off after so many times that: its last answer may be on its way to somebody slow.
const CUT_OFF: u32 = 10;

/// For open requests to end once the service stops.
const DRAIN: Duration = Duration::from_secs(60);

/// Serves connections until `stop`, then no new ones.
pub(super) async fn serve(listener: TcpListener, tls: Option<Tls>, router: Router, stop: impl Future<Output = ()>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS));
    let peers = Places::default();
    // Each connection has a receiver until it has ended.
    let (stopping, _) = watch::channel(());
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
        let Some(place) = place(&peers, peer.ip()) else {
            tracing::debug!(%peer, "too many connections of this address");
            continue;
        };
        let _ = stream.set_nodelay(true);
        let (builder, router, stopped, tls) = (builder.clone(), router.clone(), stopping.subscribe(), tls.clone());
        tokio::spawn(async move {
            match tls {
                // Finding out which version a client speaks has no time limit; without TLS it is the first.
                None => connection(builder.http1_only(), stream, router, peer, IDLE, stopped).await,
                Some(tls) => {
                    let Ok(Ok(stream)) = timeout(HEADER, tls.0.accept(stream)).await else { return };
                    let second = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                    let builder = if second { builder.http2_only() } else { builder.http1_only() };
                    connection(builder, stream, router, peer, IDLE, stopped).await;
                }
            }
            drop((permit, place));
        });
    }
    drop(listener);
    stopping.send_replace(());
    let _ = timeout(DRAIN, stopping.closed()).await;
}

/// Serves a connection until its client ends it, until it was `patience` without an open request, or until the service stops.
async fn connection<S>(
    builder: Builder<TokioExecutor>,
    stream: S,
    router: Router,
    peer: SocketAddr,
    patience: Duration,
    mut stopped: watch::Receiver<()>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stream = Awaited { stream, first: Some(Box::pin(sleep(HEADER))) };
    let requests = Arc::new(watch::Sender::new(0));
    let opened = requests.clone();
    // A layer would copy the whole router for every connection.
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        let open = Open::new(&opened);
        let answer = router.clone().call(request);
        async move { Ok::<_, Infallible>(answer.await?.map(|body| Answering { body, _open: open })) }
    });
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
    tokio::pin!(connection);
    let (mut stopping, mut ending) = (false, false);
    loop {
        tokio::select! {
            _ = connection.as_mut() => return,
            _ = stopped.changed(), if !stopping => stopping = true,
            () = idle(requests.subscribe(), if ending { patience * CUT_OFF } else { patience }) => {
                if ending {
                    return;
                }
                ending = true;
            }
        }
        connection.as_mut().graceful_shutdown();
    }
}

/// Waits until no request was open for so long.
async fn idle(mut requests: watch::Receiver<usize>, patience: Duration) {
    loop {
        let open = *requests.borrow_and_update();
        match timeout(patience, requests.changed()).await {
            Ok(Ok(())) => {}
            Err(_) if open > 0 => {}
            _ => return,
        }
    }
}

/// A request from its head to its answer's end.
struct Open(Arc<watch::Sender<usize>>);

impl Open {
    fn new(requests: &Arc<watch::Sender<usize>>) -> Self {
        requests.send_modify(|open| *open += 1);
        Self(requests.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

/// An answer's body: while it is sent, its request is open.
struct Answering {
    body: Body,
    _open: Open,
}

impl hyper::body::Body for Answering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A place for a connection. Behind this machine's own addresses may be a proxy, with all clients behind it.
fn place(peers: &Places<IpAddr>, address: IpAddr) -> Option<Place<IpAddr>> {
    let peer = whose(address);
    peers.take(peer, if peer.is_loopback() { i64::MAX } else { OF_PEER })
}

/// What one client has: an IPv4 address, or the 64 bits of an IPv6 network, in which it may choose the rest.
fn whose(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if !v6.is_loopback() => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        address => address,
    }
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

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use futures_util::stream;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::*;

    #[test]
    fn one_address_does_not_take_the_places_of_all() {
        let peers = Places::default();
        let take = |address: &str| place(&peers, address.parse().unwrap());
        let all = |address: &str| -> Vec<Place<IpAddr>> { (0..OF_PEER).map(|_| take(address).unwrap()).collect() };
        let mut held = all("203.0.113.7");
        assert!(take("203.0.113.7").is_none() && take("::ffff:203.0.113.7").is_none() && take("203.0.113.8").is_some());
        held.pop();
        assert!(take("203.0.113.7").is_some());
        // All addresses of a network are one client's.
        let network = all("2001:db8::1");
        assert!(take("2001:db8::ffff:1").is_none() && take("2001:db8:0:1::1").is_some());
        for here in ["127.0.0.1", "::1", "::ffff:127.0.0.1"] {
            let proxy = all(here);
            assert!(take(here).is_some(), "{here}");
            drop(proxy);
        }
        drop((held, network));
        assert!(peers.counts().is_empty());
    }

    /// The client's end of a connection that may be idle for a tenth of a second, and is cut off a second later.
    fn served(builder: Builder<TokioExecutor>, router: Router) -> DuplexStream {
        let (client, server) = tokio::io::duplex(1 << 16);
        tokio::spawn(async move {
            let (_stopping, stopped) = watch::channel(());
            let peer = SocketAddr::from(([127, 0, 0, 1], 1));
            connection(builder, server, router, peer, Duration::from_millis(100), stopped).await;
        });
        client
    }

    async fn heard(mut client: DuplexStream, said: &[u8]) -> Vec<u8> {
        client.write_all(said).await.unwrap();
        let mut heard = Vec::new();
        timeout(Duration::from_secs(20), client.read_to_end(&mut heard)).await.expect("it ends").unwrap();
        heard
    }

    /// HTTP/2's beginning and no request. The ping before the end is not answered.
    #[tokio::test]
    async fn who_asks_for_nothing_is_ended() {
        let client = served(Builder::new(TokioExecutor::new()).http2_only(), Router::new());
        let heard = heard(client, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
        let goaway = b"\0\0\x08\x07\0\0\0\0\0";
        assert!(heard.windows(goaway.len()).any(|frame| frame == goaway), "{heard:?}");
    }

    /// Neither while its answer is made nor while it is sent.
    #[tokio::test]
    async fn an_open_request_is_not_cut_off() {
        const SLOW: Duration = Duration::from_millis(500);
        let slow = || async {
            sleep(SLOW).await;
            Body::from_stream(stream::unfold(0, |i| async move {
                sleep(SLOW).await;
                (i < 3).then_some((Ok::<_, Infallible>("piece"), i + 1))
            }))
        };
        let client = served(Builder::new(TokioExecutor::new()).http1_only(), Router::new().route("/", get(slow)));
        let heard = String::from_utf8(heard(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await).unwrap();
        assert!(heard.matches("piece").count() == 3 && heard.ends_with("\r\n0\r\n\r\n"), "{heard}");
    }
}
