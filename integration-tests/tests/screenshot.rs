//! Reports in a real browser: drawn, in light and in dark.

#![allow(clippy::unwrap_used, reason = "a test ends where its set-up fails")]

use std::path::{Path, PathBuf};

use integration_tests::{Program, ckpt};

const SIZE: (u32, u32) = (1200, 1600);

/// Photographs a page; the picture's bytes.
async fn photograph(page: &str, dark: bool, file: &Path) -> Vec<u8> {
    let browser = std::env::var("CKPT_TEST_CHROMIUM").unwrap_or_else(|_| "chromium".to_owned());
    let profile = tempfile::tempdir().unwrap();
    // Blink counts dark as 0 and light as 1.
    let scheme = format!("--blink-settings=preferredColorScheme={}", u8::from(!dark));
    let program = Program::new(browser)
        .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", &scheme])
        .args([format!("--user-data-dir={}", profile.path().display())])
        .args([format!("--window-size={},{}", SIZE.0, SIZE.1), format!("--screenshot={}", file.display())]);
    program.arg(page).finish().await.expect_code(0);
    let png = std::fs::read(file).unwrap();
    assert!(png.starts_with(b"\x89PNG"), "{} is no picture", file.display());
    let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
    assert_eq!((number(16), number(20)), SIZE);
    png
}

#[tokio::test]
#[ignore = "needs Chromium: CKPT_TEST_CHROMIUM=chromium cargo test -p integration-tests --test screenshot -- --ignored"]
async fn reports_are_drawn_in_light_and_in_dark() {
    let folder = tempfile::tempdir().unwrap();
    // Pictures to look at, if a place is given.
    let pictures =
        std::env::var_os("CKPT_TEST_PICTURES").map_or_else(|| folder.path().to_owned(), PathBuf::from);
    let page = |name: &str| folder.path().join(format!("{name}.html"));
    ckpt!("plan", "--shape", "qwen3-8b", "--cluster", "2x8-h20", "--html")
        .arg(page("plan"))
        .finish()
        .await
        .expect_code(0);
    let update = ckpt!(
        "bench",
        "update",
        "--device",
        "host",
        "--shape",
        "qwen:64",
        "--ranks",
        "2",
        "--transport",
        "tcp"
    );
    let update = update.args(["--iterations", "2", "--floor-iterations", "0", "--html"]).arg(page("update"));
    update.env("CKPT_RUNTIME_DIR", folder.path().join("run")).finish().await.expect_code(0);
    let blank = photograph("about:blank", false, &folder.path().join("blank.png")).await;
    for name in ["plan", "update"] {
        let address = format!("file://{}", page(name).display());
        let light = photograph(&address, false, &pictures.join(format!("{name}-light.png"))).await;
        let dark = photograph(&address, true, &pictures.join(format!("{name}-dark.png"))).await;
        for picture in [&light, &dark] {
            assert!(
                picture.len() > blank.len() * 5,
                "{name}: {} bytes, a blank page has {}",
                picture.len(),
                blank.len()
            );
        }
        assert_ne!(light, dark, "{name} looks the same in light and dark");
    }
}
