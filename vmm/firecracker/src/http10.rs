//! Clients that send HTTP/1.0 but expect the behaviour of HTTP/1.1.
//!
//! Firecracker keeps connections open whatever the version of a request. So some clients send `HTTP/1.0`
//! without asking for a persistent connection, and send the next request on the same one. According to HTTP,
//! such connections are closed. So this stream replaces the version in the first line of each request.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Longest request line to check. Firecracker's paths are short.
const LONGEST_LINE: usize = 256;
const METHODS: [&[u8]; 4] = [b"GET ", b"PUT ", b"PATCH ", b"DELETE "];
const VERSION: &[u8] = b" HTTP/1.0";

/// A stream that reads `HTTP/1.0` as `HTTP/1.1`.
#[derive(Debug)]
pub(super) struct AsHttp11<S>(pub(super) S);

impl<S: AsyncRead + Unpin> AsyncRead for AsHttp11<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.0).poll_read(cx, buffer);
        // The data may be a request or part of a body. No JSON begins like a request line.
        raise_version(&mut buffer.filled_mut()[before..]);
        read
    }
}

fn raise_version(read: &mut [u8]) {
    if !METHODS.iter().any(|method| read.starts_with(method)) {
        return;
    }
    let line = &read[..read.len().min(LONGEST_LINE)];
    if let Some(end) = line.iter().position(|&byte| byte == b'\r')
        && line[..end].ends_with(VERSION)
    {
        read[end - 1] = b'1';
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AsHttp11<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_as(text: &str) -> String {
        let mut bytes = text.as_bytes().to_vec();
        raise_version(&mut bytes);
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn only_the_line_of_a_request_is_changed() {
        assert_eq!(read_as("GET / HTTP/1.0\r\n\r\n"), "GET / HTTP/1.1\r\n\r\n");
        assert_eq!(
            read_as("PATCH /vm HTTP/1.0\r\nA: HTTP/1.0\r\n\r\n"),
            "PATCH /vm HTTP/1.1\r\nA: HTTP/1.0\r\n\r\n"
        );
        let others = [
            "".to_owned(),
            "GET / HTTP/1.1\r\n\r\n".to_owned(),
            "GET / HTTP/1.0".to_owned(),
            "{\"a\": \"GET / HTTP/1.0\"}".to_owned(),
            format!("GET /{} HTTP/1.0\r\n\r\n", "x".repeat(300)),
        ];
        others.iter().for_each(|other| assert_eq!(read_as(other), *other));
    }
}
