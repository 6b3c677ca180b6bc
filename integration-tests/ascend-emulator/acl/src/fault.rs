//! Faults that a test asks for.

use std::{
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

struct Fault {
    function: String,
    /// `None`: the call never returns.
    code: Option<i32>,
    /// Calls until it strikes.
    left: u32,
}

fn faults() -> MutexGuard<'static, Vec<Fault>> {
    static FAULTS: OnceLock<Mutex<Vec<Fault>>> = OnceLock::new();
    let of_environment = || Mutex::new(parse(&std::env::var("ASCEND_EMULATOR_FAULT").unwrap_or_default()));
    FAULTS.get_or_init(of_environment).lock().unwrap_or_else(PoisonError::into_inner)
}

/// A fault that cannot be read is a mistake in a test, which must not pass.
fn parse(text: &str) -> Vec<Fault> {
    let rank = std::env::var("RANK").unwrap_or_default();
    let one = |text: &str| {
        let (on, rest) = text.split_once(':').unwrap_or((&rank, text));
        let (function, what) = rest.split_once('=').unwrap_or_else(|| panic!("no fault: {text}"));
        let (code, call) = what.split_once('@').unwrap_or((what, "1"));
        let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("no fault: {text}"));
        let code = (code != "hang").then(|| number(code));
        let left = u32::try_from(number(call)).unwrap_or(1);
        (on == rank).then(|| Fault { function: function.to_owned(), code, left })
    };
    text.split(';').map(str::trim).filter(|text| !text.is_empty()).filter_map(one).collect()
}

pub(crate) fn set(text: &str) {
    *faults() = parse(text);
}

/// 0, or what this call of `function` must return. It may not return at all.
pub(crate) fn injected(function: &str) -> i32 {
    let mut faults = faults();
    let Some(place) = faults.iter().position(|fault| fault.function == function) else { return 0 };
    faults[place].left -= 1;
    if faults[place].left > 0 {
        return 0;
    }
    let fault = faults.remove(place);
    drop(faults);
    match fault.code {
        Some(code) => code,
        None => loop {
            std::thread::sleep(Duration::from_secs(3600));
        },
    }
}
