//! Reads what `npu-smi` says of the processes on an NPU.

/// The chip that the process `pid` uses, by what `npu-smi info -t proc-mem -i <npu>` printed: npu x chips of an NPU + chip;
/// `None` if the text does not tell. Each chip's processes stand before its `Chip ID`.
pub fn npu_chip_index(npu: u32, pid: u32, text: &str) -> Option<u32> {
    let after_pid = &text[end_of_number(text, &pid.to_string())?..];
    let chips = number_after(text, "Chip Count")?;
    npu.checked_mul(chips)?.checked_add(number_after(after_pid, "Chip ID")?)
}

/// Where the first `number` ends that is not a part of a longer one and is said to be a process id.
fn end_of_number(text: &str, number: &str) -> Option<usize> {
    let digit = |c: Option<char>| c.is_some_and(|c| c.is_ascii_digit());
    text.match_indices(number).map(|(start, _)| (start, start + number.len())).find_map(|(start, end)| {
        let alone = !digit(text[..start].chars().next_back()) && !digit(text[end..].chars().next());
        let line = text[..start].rsplit('\n').next().unwrap_or_default().to_ascii_lowercase();
        let label = line.trim_end_matches(|c: char| c.is_whitespace() || c == ':');
        let is_pid = label.ends_with("process id") || label.ends_with("process id in container");
        (alone && is_pid).then_some(end)
    })
}

fn number_after(text: &str, label: &str) -> Option<u32> {
    let rest = &text[text.find(label)? + label.len()..];
    let rest = rest.trim_start_matches(|c: char| !c.is_ascii_digit());
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One chip an NPU, as on Atlas 800 A2.
    const ONE_CHIP: &str = "\
\tNPU ID                         : 3
\tChip Count                     : 1

\tProcess id:41273                Process name:python3             Process memory(MB):24578
\tProcess id:812                  Process name:ckpt                Process memory(MB):812999
\tChip ID                        : 0
";

    /// Two chips an NPU, as on A3.
    const TWO_CHIPS: &str = "\
\tNPU ID                         : 5
\tChip Count                     : 2

\tProcess id                     : 777
\tProcess name                   : python3
\tProcess memory(MB)             : 1777
\tChip ID                        : 0

\tProcess id                     : 1778
\tProcess name                   : python3
\tProcess memory(MB)             : 777
\tChip ID                        : 1
";

    #[test]
    fn the_index_counts_chips() {
        assert_eq!(npu_chip_index(3, 41273, ONE_CHIP), Some(3));
        assert_eq!(npu_chip_index(3, 812, ONE_CHIP), Some(3));
        assert_eq!(npu_chip_index(5, 777, TWO_CHIPS), Some(10));
        assert_eq!(npu_chip_index(5, 1778, TWO_CHIPS), Some(11));
    }

    #[test]
    fn a_process_that_is_not_there_is_not_found_in_other_numbers() {
        // 41 and 12 begin other ids, 24578 and 812999 are memory, 1 is a count.
        for pid in [41, 12, 24578, 812_999, 1, 1777] {
            assert_eq!(npu_chip_index(3, pid, ONE_CHIP), None, "{pid}");
        }
        assert_eq!(npu_chip_index(5, 1777, TWO_CHIPS), None);
        assert_eq!(npu_chip_index(0, 5, ""), None);
        assert_eq!(npu_chip_index(0, 5, "Process id: 5"), None);
    }

    #[test]
    fn numbers_that_are_too_large_name_no_chip() {
        let text = "Chip Count : 4294967295\nProcess id: 5\nChip ID : 4294967295\n";
        assert_eq!(npu_chip_index(1, 5, text), None);
        assert_eq!(npu_chip_index(0, 5, text), Some(u32::MAX));
        assert_eq!(npu_chip_index(1, 5, "Chip Count : 99999999999\nProcess id: 5\nChip ID : 0\n"), None);
    }
}
