#![forbid(unsafe_code)]
//! The tables of `docs/qemu.md` are those of the program. They are written with
//! `PANDO_WRITE_DOCS=1 cargo nextest run -p pando-tests --test qemu_docs`.

use std::fs;

use anyhow::{Context, Result, ensure};
use pando_tests::style::source::root;
use pando_vmm::qemu::line::options::{Does, OPTIONS};
use pando_vmm::qemu::line::refused::REFUSED;
use pando_vmm::qemu::qmp::commands::COMMANDS;

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

fn options() -> String {
    let mut text = "| option | what it does |\n|---|---|\n".to_owned();
    for option in OPTIONS {
        let argument = option.argument.filter(|argument| !argument.is_empty());
        let typed = match argument {
            Some(argument) => format!("-{} {argument}", option.name),
            None => format!("-{}", option.name),
        };
        let note = match option.does {
            Does::Something => "",
            Does::AsItIs => "; accepted, and so anyway",
        };
        text += &format!("| `{}` | {}{note} |\n", cell(&typed), cell(option.help));
    }
    text
}

fn refused() -> String {
    let mut text = "| options | instead |\n|---|---|\n".to_owned();
    for refused in REFUSED {
        let names: Vec<String> = refused
            .names
            .iter()
            .map(|name| format!("`-{name}`"))
            .collect();
        text += &format!("| {} | {} |\n", names.join(" "), cell(refused.instead));
    }
    text
}

fn commands() -> String {
    let mut text = "| command | arguments | what it does |\n|---|---|---|\n".to_owned();
    for command in COMMANDS {
        let args: Vec<String> = command
            .args
            .iter()
            .map(|arg| {
                let optional = if arg.required { "" } else { "?" };
                format!("`{}{optional}`", arg.name)
            })
            .collect();
        let more = if command.open { " and others" } else { "" };
        text += &format!(
            "| `{}` | {}{more} | {} |\n",
            command.name,
            args.join(" "),
            cell(command.about)
        );
    }
    text
}

/// The page with what is between the marks of `name` replaced.
fn replace(page: &str, name: &str, table: &str) -> Result<String> {
    let mark = format!("<!-- {name}: written by tests/tests/qemu_docs.rs -->\n");
    let begin = page
        .find(&mark)
        .with_context(|| format!("no mark {name}"))?
        + mark.len();
    let end = page[begin..].find("<!-- end -->").context("no end")? + begin;
    Ok(format!("{}\n{table}\n{}", &page[..begin], &page[end..]))
}

#[test]
fn the_tables_are_those_of_the_program() -> Result<()> {
    let path = root()?.join("docs/qemu.md");
    let page = fs::read_to_string(&path)?;
    let mut right = page.clone();
    for (name, table) in [
        ("options", options()),
        ("refused", refused()),
        ("commands", commands()),
    ] {
        right = replace(&right, name, &table)?;
    }
    if std::env::var_os("PANDO_WRITE_DOCS").is_some() {
        fs::write(&path, &right)?;
        return Ok(());
    }
    ensure!(
        page == right,
        "docs/qemu.md has other tables: run this test with PANDO_WRITE_DOCS=1"
    );
    Ok(())
}
