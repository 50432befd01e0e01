#![forbid(unsafe_code)]
//! Inputs of fuzz targets: `fuzz-inputs list`, `fuzz-inputs seeds DIR`, `fuzz-inputs replay TARGET FILE...`.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use pando_fuzz::{TARGETS, scratch, target};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["list"] => {
            for target in TARGETS {
                println!("{} {}", target.name, target.max_bytes);
            }
            Ok(())
        }
        ["seeds", directory] => seeds(Path::new(directory)),
        ["replay", name, files @ ..] => replay(name, files),
        _ => bail!("usage: fuzz-inputs list | seeds DIR | replay TARGET FILE..."),
    }
}

/// Writes seeds and dictionary of each target.
fn seeds(directory: &Path) -> Result<()> {
    for target in TARGETS {
        let seeds = directory.join(target.name);
        fs::create_dir_all(&seeds)?;
        for (number, seed) in (target.seeds)().iter().enumerate() {
            fs::write(seeds.join(format!("{number:03}")), seed)?;
        }
        let mut dictionary = String::new();
        for word in (target.words)() {
            dictionary.push('"');
            for byte in word.bytes() {
                write!(dictionary, "\\x{byte:02x}")?;
            }
            dictionary.push_str("\"\n");
        }
        fs::write(directory.join(format!("{}.dict", target.name)), dictionary)?;
    }
    Ok(())
}

fn replay(name: &str, files: &[&str]) -> Result<()> {
    let target = target(name).with_context(|| format!("no target is called {name}"))?;
    // Before the first of them: a target may stand elsewhere.
    let read = |file: &&str| fs::read(file).with_context(|| format!("cannot read {file}"));
    let inputs = files.iter().map(read).collect::<Result<Vec<_>>>()?;
    for (file, input) in files.iter().zip(inputs) {
        println!("{file}: {} bytes", input.len());
        (target.run)(&input);
    }
    scratch::remove()
}
