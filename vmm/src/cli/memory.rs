#![forbid(unsafe_code)]
//! What clones take of memory, for people and for programs.

use serde_json::{Value, json};

use super::out::say;
use super::size::human_bytes;
use super::table::table;
use crate::clone::usage::Usage;
use crate::observe::memory::marginal::MarginalCost;
use crate::observe::memory::ram::Accuracy;

/// Prints the sum over clones when most of them were measured, and what one more costs.
pub fn print_memory(usage: &Usage, kernel: Result<(), &str>) {
    let most = usage.most();
    let Some(accuracy) = most.accuracy else {
        return;
    };
    let mut rows = table(&["memory", "a clone", "all"]);
    let mut row = |name: &str, bytes: Option<u64>| {
        let shown = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), human_bytes);
        rows.add_row([
            name.to_owned(),
            shown(bytes.map(|bytes| bytes / most.clones)),
            shown(bytes),
        ]);
    };
    let of_ram = [
        "RAM, private dirty",
        "RAM, private clean",
        "RAM, shared",
        "RAM, zero",
        "RAM, absent",
        "RAM, swapped",
    ];
    for (name, (_, bytes)) in of_ram.into_iter().zip(most.ram.classes()) {
        row(name, Some(bytes));
    }
    row("rest of process, private", Some(most.process_private_bytes));
    row("rest of process, shared", Some(most.process_shared_bytes));
    row("page tables", Some(most.page_tables_bytes));
    row("kernel, page tables included", most.kernel_bytes);
    say!("\n{rows}");
    say!("of {} clones at once, each as last measured", most.clones);
    if let (None, Err(why)) = (most.kernel_bytes, kernel) {
        say!("what the kernel holds is unknown: {why}");
    }
    match accuracy {
        Accuracy::Exact => (),
        Accuracy::WrittenUnknown => {
            say!("private dirty includes clean pages: written pages are not tracked");
        }
        Accuracy::Sums => say!(
            "private dirty includes clean pages and absent includes zero pages: this kernel has no \
             PAGEMAP_SCAN (Linux 6.7)"
        ),
    }
    if let Some(cost) = usage.marginal() {
        say!("one more clone costs {}", marginal(&cost));
    }
}

/// `300 KiB, give or take 20 KiB (95 %, 64 starts)`
#[expect(
    clippy::cast_possible_truncation,
    reason = "a float converts to an integer by saturation"
)]
fn marginal(cost: &MarginalCost) -> String {
    let bytes = cost.bytes as i64;
    let sign = if bytes < 0 { "-" } else { "" };
    format!(
        "{sign}{}, give or take {} (95 %, {} starts)",
        human_bytes(bytes.unsigned_abs()),
        human_bytes((cost.plus_minus_bytes as i64).unsigned_abs()),
        cost.starts
    )
}

/// The same for a program; `marginal` is null while too few clones have started in a row, and
/// `kernel_unknown` says why the kernel's share is.
pub fn memory_document(usage: &Usage, kernel: Result<(), &str>) -> Value {
    json!({
        "total": usage.most(),
        "marginal": usage.marginal(),
        "kernel_unknown": kernel.err(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_is_shown_with_its_doubt() {
        let cost = MarginalCost {
            bytes: 300.0 * 1024.0,
            plus_minus_bytes: 1536.0,
            starts: 64,
        };
        let text = "300 KiB, give or take 1.5 KiB (95 %, 64 starts)";
        assert_eq!(marginal(&cost), text);
        let negative = MarginalCost {
            bytes: -2048.0,
            ..cost
        };
        assert!(marginal(&negative).starts_with("-2 KiB"));
    }
}
