//! A measured update as a picture: lanes per rank, bandwidth, bucket times.

use std::collections::BTreeMap;

use ckpt_core::update::trace::Stage;

use super::report::{Measured, RankReport, Report};
use crate::{
    picture::{Bar, Kind, Lane, Page, Rate, bandwidth, histogram, lanes},
    timeline::stage_name,
};

/// Lanes that are drawn.
const LANES: usize = 16;

fn kind(stage: Stage) -> Option<Kind> {
    match stage {
        Stage::Load => Some(Kind::Load),
        Stage::Pull => Some(Kind::Pull),
        Stage::Exchange => Some(Kind::Exchange),
        Stage::Reload => Some(Kind::Reload),
        Stage::Join
        | Stage::Prepare
        | Stage::Go
        | Stage::Open
        | Stage::Commit
        | Stage::Release
        | Stage::PostHook => Some(Kind::Other),
        _ => None,
    }
}

/// Adds the drawings of the last update.
pub(super) fn draw(page: &mut Page, report: &Report, ranks: &[RankReport]) {
    page.text(&format!(
        "Seconds. The machine's limit, a plain copy of the shares to the devices in the same processes, takes {:.4} s.",
        report.h2d_limit_s
    ));
    let last: Vec<(usize, &Measured)> =
        (0..).zip(ranks).filter_map(|(rank, of)| Some((rank, of.updates.last()?))).collect();
    let Some(zero) = last.iter().map(|(_, update)| update.began_us).min() else { return };
    page.heading("The last update");
    let lane = |(rank, update): &(usize, &Measured)| {
        let offset = (update.began_us - zero) as f64;
        let bars = update.spans.iter().filter_map(|(stage, bucket, start, end)| {
            let stage_name = stage_name(*stage);
            let name = match bucket {
                Some(bucket) => format!("{stage_name} of bucket {bucket}"),
                None => stage_name,
            };
            let at = |us: u64| (offset + us as f64) / 1e6;
            Some(Bar { kind: kind(*stage)?, start: at(*start), end: at(*end), name })
        });
        Lane { name: format!("rank {rank}"), bars: bars.collect() }
    };
    page.drawing(&lanes(&last.iter().take(LANES).map(lane).collect::<Vec<_>>(), &[]));
    page.heading("Bandwidth over time");
    let rate = |stage: Stage, name: &str, own: bool, of: &[(usize, &Measured)]| {
        let moved = of.iter().flat_map(|(_, update)| {
            let offset = (update.began_us - zero) as f64 / 1e6;
            update.spans.iter().filter(move |span| span.0 == stage).filter_map(
                move |(_, bucket, start, end)| {
                    let (all, rooted) = update.bucket_bytes.get((*bucket)? as usize)?;
                    let bytes = if own { *rooted } else { *all };
                    Some((offset + *start as f64 / 1e6, offset + *end as f64 / 1e6, bytes as f64))
                },
            )
        });
        Rate { name: name.to_owned(), kind: kind(stage).unwrap_or(Kind::Other), moved: moved.collect() }
    };
    let first = &last[..1];
    let rates = [
        rate(Stage::Load, "H2D of all ranks", true, &last),
        rate(Stage::Exchange, "into rank 0", false, first),
        rate(Stage::Reload, "worker of rank 0", false, first),
    ];
    page.drawing(&bandwidth(&rates.into_iter().filter(|rate| !rate.moved.is_empty()).collect::<Vec<_>>()));
    page.heading("Buckets");
    page.drawing(&histogram("first byte of a bucket until its ack, on each rank", &bucket_times(&last)));
}

fn bucket_times(last: &[(usize, &Measured)]) -> Vec<f64> {
    let mut times: BTreeMap<(usize, u32), (u64, u64)> = BTreeMap::new();
    for (rank, update) in last {
        for (_, bucket, start, end) in &update.spans {
            let Some(bucket) = bucket else { continue };
            let time = times.entry((*rank, *bucket)).or_insert((u64::MAX, 0));
            *time = (time.0.min(*start), time.1.max(*end));
        }
    }
    times.into_values().map(|(start, end)| (end - start) as f64 / 1e6).collect()
}
