//! Clients that request one resource repeatedly.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Serialize;

use super::percentile_us;

/// The results for one resource.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Load {
    pub(super) path: String,
    /// Responses per second to all clients together.
    pub(super) per_second: f64,
    /// Median latency, in microseconds.
    pub(super) p50_us: f64,
    /// 99th percentile of the latency, in microseconds.
    pub(super) p99_us: f64,
    /// The longest latency, in microseconds.
    pub(super) max_us: f64,
    /// Length of a response's body in bytes.
    pub(super) bytes: usize,
}

/// Measures clients that request a resource.
pub(super) fn measure(socket: &Path, path: &str, clients: u32, requests: u32) -> Result<Load> {
    // The delay of the first request does not count.
    let bytes = Connection::open(socket, path)?.ask()?;
    let each = requests.div_ceil(clients);
    let started = Instant::now();
    let times = thread::scope(|scope| {
        let work = || -> Result<Vec<Duration>> {
            let mut connection = Connection::open(socket, path)?;
            (0..each)
                .map(|_| {
                    let asked = Instant::now();
                    connection.ask().map(|_| asked.elapsed())
                })
                .collect()
        };
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(work)).collect();
        let results = threads.into_iter().map(|thread| thread.join());
        results
            .map(|result| result.unwrap_or_else(|_| Err(anyhow!("a client panicked"))))
            .collect::<Result<Vec<_>>>()
    })?;
    let took = started.elapsed();
    let mut times = times.concat();
    times.sort_unstable();
    Ok(Load {
        path: path.to_owned(),
        per_second: times.len() as f64 / took.as_secs_f64(),
        p50_us: percentile_us(&times, 50),
        p99_us: percentile_us(&times, 99),
        max_us: percentile_us(&times, 100),
        bytes,
    })
}

/// A minimal client.
struct Connection {
    stream: UnixStream,
    request: String,
    buffer: Vec<u8>,
}

impl Connection {
    fn open(socket: &Path, path: &str) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("connect to the server")?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: samepage\r\n\r\n");
        Ok(Self { stream, request, buffer: vec![0; 1 << 20] })
    }

    /// Sends a request, and returns the length of the response's body.
    fn ask(&mut self) -> Result<usize> {
        self.stream.write_all(self.request.as_bytes()).context("ask the server")?;
        let (mut filled, mut whole) = (0, None);
        loop {
            let count = self.stream.read(&mut self.buffer[filled..]).context("read the answer")?;
            ensure!(count > 0, "the server closed the connection");
            filled += count;
            if whole.is_none() {
                whole = length(&self.buffer[..filled])?;
            }
            if let Some((head, body)) = whole
                && filled >= head + body
            {
                return Ok(body);
            }
            ensure!(filled < self.buffer.len(), "the answer is longer than expected");
        }
    }
}

/// Returns the lengths of a response's head and body, or `None` if the head is incomplete.
fn length(answer: &[u8]) -> Result<Option<(usize, usize)>> {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else { return Ok(None) };
    let head = str::from_utf8(&answer[..end]).context("the answer is no HTTP")?;
    ensure!(head.starts_with("HTTP/1.1 200 "), "the answer is {}", head.lines().next().unwrap_or_default());
    let field = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse())
    });
    match field {
        Some(Ok(body)) => Ok(Some((end + 4, body))),
        _ => bail!("the answer does not say its length"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_says_its_length() {
        assert_eq!(length(b"HTTP/1.1 200 OK\r\nconte").unwrap(), None);
        let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello";
        assert_eq!(length(whole).unwrap(), Some((whole.len() - 5, 5)));
        assert!(length(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").is_err());
        assert!(length(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }
}
