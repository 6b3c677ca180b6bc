//! Lines of several ranks on one terminal.

use std::io::Write;

use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

/// A line that grows beyond this is printed in pieces.
const LONGEST_LINE_BYTES: usize = 64 << 10;

/// Copies `from` line by line with `[rank] ` before each, until it ends. `to` is locked for one line at a time.
pub(super) async fn tag<W: Write>(rank: u32, from: impl AsyncRead + Unpin, to: impl Fn() -> W) {
    let mut reader = BufReader::with_capacity(LONGEST_LINE_BYTES, from);
    let prefix = format!("[{rank}] ").into_bytes();
    let mut line = prefix.clone();
    let print = |line: &mut Vec<u8>| {
        line.push(b'\n');
        let mut to = to();
        // A reader that went away does not end the ranks.
        let _ = to.write_all(line).and_then(|()| to.flush());
        line.truncate(prefix.len());
    };
    loop {
        let available = match reader.fill_buf().await {
            Ok([]) | Err(_) => break,
            Ok(available) => available,
        };
        let (taken, ended) = match available.iter().position(|byte| *byte == b'\n') {
            Some(end) => (end, true),
            None => (available.len(), false),
        };
        line.extend_from_slice(&available[..taken]);
        reader.consume(taken + usize::from(ended));
        if ended || line.len() >= LONGEST_LINE_BYTES {
            print(&mut line);
        }
    }
    if line.len() > prefix.len() {
        print(&mut line);
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc};

    use super::*;

    #[derive(Clone, Default)]
    struct Shared(Rc<RefCell<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.borrow_mut().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn lines_are_tagged_and_no_byte_is_lost() {
        let out = Shared::default();
        let text = b"one\n\n\xff\xfe two\r\nlast without end";
        tag(3, &text[..], || out.clone()).await;
        assert_eq!(*out.0.borrow(), b"[3] one\n[3] \n[3] \xff\xfe two\r\n[3] last without end\n");

        let out = Shared::default();
        let long = vec![b'x'; 3 * LONGEST_LINE_BYTES + 10];
        tag(0, &long[..], || out.clone()).await;
        let out = out.0.borrow();
        assert_eq!(out.iter().filter(|byte| **byte == b'x').count(), long.len());
        assert!(out.split(|byte| *byte == b'\n').all(|line| line.len() <= 2 * LONGEST_LINE_BYTES));
    }
}
