use std::path::PathBuf;

use proptest::prelude::*;

use super::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn down(message: &Down) -> String {
    let mut out = Vec::new();
    message.encode(&mut out);
    hex(&out)
}

fn up(message: &Up) -> String {
    let mut out = Vec::new();
    message.encode(&mut out);
    hex(&out)
}

fn meta(name: &str, dtype: DType, shape: &[u64]) -> TensorMeta {
    TensorMeta::new(name, dtype, shape).unwrap()
}

#[test]
fn every_dtype_has_one_code() {
    for dtype in DType::ALL {
        assert_eq!(DTYPE_CODES.iter().filter(|(_, d)| d == dtype).count(), 1, "{dtype}");
    }
    let mut codes: Vec<u8> = DTYPE_CODES.iter().map(|(code, _)| *code).collect();
    codes.dedup();
    assert_eq!(codes.len(), DTYPE_CODES.len());
    assert!(!codes.contains(&0));
}

/// The bytes of `docs/worker-protocol.md`: another implementation was written from them. Never change, only add.
#[test]
fn golden_bytes() {
    assert_eq!(hex(&preamble()), "434b505457524b52010001000000000000".get(..32).unwrap());
    let open = Down::Open(Open {
        ring: RingId { process: 0x1122, number: 3 },
        ring_bytes: 4096,
        export: RingExport::Host { path: PathBuf::from("/r/x"), offset_bytes: 512 },
        layout: 0xabcd,
        layout_len: 2,
    });
    assert_eq!(
        down(&open),
        concat!(
            "3d00000001000000",
            "2211000000000000",
            "0300000000000000",
            "0010000000000000",
            "cdab0000000000000000000000000000",
            "02000000",
            "01",
            "0002000000000000",
            "04000000",
            "2f722f78"
        )
    );
    let layout = Down::Layout { first: 0, tensors: vec![meta("w", DType::BF16, &[2, 3])] };
    assert_eq!(
        down(&layout),
        concat!(
            "2000000002000000",
            "00000000",
            "01000000",
            "11",
            "0200",
            "0200000000000000",
            "0300000000000000",
            "01000000",
            "77"
        )
    );
    let bucket = Down::Bucket {
        bucket: 5,
        entries: vec![
            Entry { tensor: TensorRef::Index(1), offset: 256, digest: None },
            Entry { tensor: TensorRef::Inline(meta("s", DType::F32, &[])), offset: 512, digest: Some(0x77) },
        ],
    };
    assert_eq!(
        down(&bucket),
        concat!(
            "2e00000003000000",
            "05000000",
            "02000000",
            "00",
            "0001000000000000",
            "01000000",
            "03",
            "0002000000000000",
            "12",
            "0000",
            "01000000",
            "73",
            "7700000000000000"
        )
    );
    assert_eq!(down(&Down::Release { keep: true }), "010000000400000001");
    assert_eq!(down(&Down::Finish), "0000000005000000");
    assert_eq!(down(&Down::Fail { text: "no".into() }), "0600000006000000020000006e6f");
    let hello = Up::Hello(Hello {
        pid: 7,
        capabilities: CAN_HOST,
        window: 1,
        layout: 0,
        uuid: "U".into(),
        software: "s".into(),
    });
    assert_eq!(
        up(&hello),
        concat!(
            "2a00000010000000",
            "07000000",
            "0100000000000000",
            "01000000",
            "00000000000000000000000000000000",
            "01000000",
            "55",
            "01000000",
            "73"
        )
    );
    assert_eq!(up(&Up::Opened { kept: false }), "010000001100000000");
    assert_eq!(up(&Up::Ack { bucket: 5 }), "040000001200000005000000");
    assert_eq!(up(&Up::Released), "0000000013000000");
    assert_eq!(up(&Up::Finished), "0000000014000000");
    assert_eq!(up(&Up::Error { text: "e".into() }), "05000000150000000100000065");
    assert_eq!(up(&Up::Dropped), "0000000016000000");
    assert_eq!(layout_digest(&[meta("w", DType::BF16, &[2, 3])]), GOLDEN_LAYOUT_DIGEST);
}

const GOLDEN_LAYOUT_DIGEST: u128 = 22_979_478_969_157_685_535_443_728_847_339_470_455;

#[test]
fn clipping_keeps_both_ends() {
    let text = format!("first{}last \u{e9}", "\u{e9}".repeat(1000));
    let clipped = clip(&text, 200);
    assert!(
        clipped.len() <= 200 && clipped.starts_with("first") && clipped.ends_with("last \u{e9}"),
        "{clipped}"
    );
    assert_eq!(clip("short", 200), "short");
}

fn tensor() -> impl Strategy<Value = TensorMeta> {
    let dtype = prop::sample::select(DType::ALL.to_vec());
    (".{0,12}", dtype, prop::collection::vec(0_u64..9, 0..4))
        .prop_filter_map("ends on a byte", |(name, dtype, shape)| {
            TensorMeta::new(name.as_str(), dtype, shape).ok()
        })
}

fn any_down() -> impl Strategy<Value = Down> {
    let export = prop_oneof![
        ("/[a-z]{0,9}", any::<u64>())
            .prop_map(|(p, o)| RingExport::Host { path: PathBuf::from(p), offset_bytes: o }),
        (any::<[u8; 32]>(), any::<u64>())
            .prop_map(|(h, o)| RingExport::Cuda { handle: h.to_vec(), offset_bytes: o }),
        (any::<[u8; 32]>(), any::<u64>())
            .prop_map(|(h, o)| RingExport::Ascend { key: h.to_vec(), offset_bytes: o }),
    ];
    let reference =
        prop_oneof![any::<u32>().prop_map(TensorRef::Index), tensor().prop_map(TensorRef::Inline)];
    let entry = (reference, any::<u64>(), any::<Option<u64>>()).prop_map(|(tensor, offset, digest)| Entry {
        tensor,
        offset,
        digest,
    });
    prop_oneof![
        (any::<(u64, u64, u64, u128, u32)>(), export).prop_map(
            |((process, number, ring_bytes, layout, n), export)| {
                Down::Open(Open {
                    ring: RingId { process, number },
                    ring_bytes,
                    export,
                    layout,
                    layout_len: n,
                })
            }
        ),
        (any::<u32>(), prop::collection::vec(tensor(), 0..6))
            .prop_map(|(first, tensors)| Down::Layout { first, tensors }),
        (any::<u32>(), prop::collection::vec(entry, 0..6))
            .prop_map(|(bucket, entries)| Down::Bucket { bucket, entries }),
        any::<bool>().prop_map(|keep| Down::Release { keep }),
        Just(Down::Finish),
        ".{0,40}".prop_map(|text| Down::Fail { text }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn messages_round_trip_and_no_prefix_of_one_is_one(message in any_down()) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let (len, kind) = header(bytes.first_chunk().unwrap(), MAX_TO_WORKER).unwrap();
        let body = &bytes[HEADER_LEN..];
        prop_assert_eq!(len, body.len());
        prop_assert_eq!(Down::decode(kind, body).unwrap(), message);
        for cut in 0..body.len() {
            prop_assert!(Down::decode(kind, &body[..cut]).is_err());
        }
    }

    #[test]
    fn any_bytes_decode_or_fail_without_panic(kind in 0_u8..24, body in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = Down::decode(kind, &body);
        let _ = Up::decode(kind, &body);
    }
}
