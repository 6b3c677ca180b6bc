//! Progress bars on a terminal, nothing in pipes.

use std::{
    io::IsTerminal,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use ckpt_core::{
    Error, Result,
    checkpoint::Progress,
    device::Ring,
    sink::{Afterwards, BucketMessage, WeightSink},
};
use indicatif::{ProgressBar, ProgressStyle};

/// Between two turns of a spinner.
const TURN: Duration = Duration::from_millis(100);

/// Whether anybody would see a bar on stderr.
fn is_seen() -> bool {
    std::io::stderr().is_terminal()
}

/// Bytes on their way; the bar goes when this is dropped.
#[derive(Debug)]
pub(crate) struct Bar(ProgressBar);

impl Bar {
    fn new(label: &str, total_bytes: u64) -> Self {
        let bar = ProgressBar::new(total_bytes);
        let template = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(label.to_owned());
        Self(bar)
    }

    /// A checkpoint on its way into memory; `None` if nobody would see it.
    pub(crate) fn load(label: &str, total_bytes: u64) -> Option<Arc<dyn Progress>> {
        is_seen().then(|| Arc::new(Self::new(label, total_bytes)) as Arc<dyn Progress>)
    }

    /// Something that takes an unknown time; `None` if nobody would see it.
    pub(crate) fn wait(label: &str) -> Option<Self> {
        is_seen().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
                bar.set_style(style);
            }
            bar.set_message(label.to_owned());
            bar.enable_steady_tick(TURN);
            Self(bar)
        })
    }

    /// The worker's link with a bar of what the worker has taken; unchanged if nobody would see it.
    pub(crate) fn watch(label: &str, total_bytes: u64, sink: Box<dyn WeightSink>) -> Box<dyn WeightSink> {
        match is_seen() {
            true => Box::new(Watched { sink, bar: Self::new(label, total_bytes) }),
            false => sink,
        }
    }
}

impl Progress for Bar {
    fn advance(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// A link that counts the bytes that its worker acknowledged.
struct Watched {
    sink: Box<dyn WeightSink>,
    bar: Bar,
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl WeightSink for Watched {
    fn endpoint(&self) -> &str {
        self.sink.endpoint()
    }

    async fn open(&mut self, ring: &dyn Ring, deadline: Instant) -> Result<()> {
        self.sink.open(ring, deadline).await
    }

    async fn deliver(&mut self, bucket: &BucketMessage, deadline: Instant) -> Result<()> {
        self.sink.deliver(bucket, deadline).await?;
        self.bar.advance(bucket.tensors.iter().map(|tensor| tensor.meta.len_bytes()).sum());
        Ok(())
    }

    async fn release(&mut self, deadline: Instant) -> Result<()> {
        self.sink.release(deadline).await
    }

    async fn finish(&mut self, deadline: Instant) -> Result<()> {
        self.sink.finish(deadline).await
    }

    async fn fail(&mut self, cause: &Error, deadline: Instant) -> Result<Afterwards> {
        self.sink.fail(cause, deadline).await
    }
}

#[cfg(test)]
mod tests {
    use ckpt_core::{DType, sink::TensorInRing, types::TensorMeta};

    use super::*;

    struct Silent;

    #[async_trait]
    impl WeightSink for Silent {
        fn endpoint(&self) -> &str {
            "here"
        }

        async fn open(&mut self, _: &dyn Ring, _: Instant) -> Result<()> {
            Ok(())
        }

        async fn deliver(&mut self, bucket: &BucketMessage, _: Instant) -> Result<()> {
            match bucket.bucket {
                0 => Ok(()),
                _ => Err(Error::new(ckpt_core::ErrorKind::Backend, "deliver", "no")),
            }
        }

        async fn release(&mut self, _: Instant) -> Result<()> {
            Ok(())
        }

        async fn finish(&mut self, _: Instant) -> Result<()> {
            Ok(())
        }

        async fn fail(&mut self, _: &Error, _: Instant) -> Result<Afterwards> {
            Ok(Afterwards::LetGo)
        }
    }

    #[tokio::test]
    async fn only_what_was_acknowledged_counts() {
        let mut watched = Watched { sink: Box::new(Silent), bar: Bar::new("test", 200) };
        let meta = TensorMeta::new("a", DType::U8, [100]).unwrap();
        let message =
            |bucket| BucketMessage { bucket, tensors: vec![TensorInRing { meta: meta.clone(), offset: 0 }] };
        let deadline = Instant::now() + Duration::from_secs(1);
        watched.deliver(&message(0), deadline).await.unwrap();
        watched.deliver(&message(1), deadline).await.unwrap_err();
        assert_eq!(watched.bar.0.position(), 100);
        assert_eq!(watched.endpoint(), "here");
    }
}
