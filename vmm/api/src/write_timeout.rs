//! Disconnects clients that do not read.

use std::pin::Pin;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_io_timeout::TimeoutStream;

/// Longest time without progress of a write.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Returns a stream on which a write fails if it makes no progress for a minute. Without this, clients that
/// never read would keep their connections for ever.
pub fn with_write_timeout<S: AsyncRead + AsyncWrite>(stream: S) -> Pin<Box<TimeoutStream<S>>> {
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIMEOUT));
    Box::pin(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    fn run<T>(future: impl Future<Output = T>) -> T {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().start_paused(true).build().unwrap().block_on(future)
    }

    #[test]
    fn who_never_reads_is_given_up() {
        run(async {
            let (ours, _theirs) = UnixStream::pair().unwrap();
            let mut ours = with_write_timeout(ours);
            let error = ours.write_all(&vec![0; 512 << 10]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        });
    }

    #[test]
    fn who_reads_gets_everything() {
        run(async {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let writer =
                tokio::spawn(async move { with_write_timeout(ours).write_all(&vec![7; 512 << 10]).await });
            let mut all = Vec::new();
            theirs.read_to_end(&mut all).await.unwrap();
            writer.await.unwrap().unwrap();
            assert_eq!(all.len(), 512 << 10);
        });
    }
}
