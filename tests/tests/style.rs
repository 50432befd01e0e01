#![forbid(unsafe_code)]
//! The house rules, kept by reading the source as text: needs no device, no network.

use anyhow::{Result, ensure};
use pando_tests::style::source::root;
use pando_tests::style::{Finding, Project, declared, layers, shape, unsafety};

fn project() -> Result<Project> {
    let project = Project::read()?;
    ensure!(
        project.sources.len() > 20,
        "the project's files were not found"
    );
    Ok(project)
}

fn none(findings: &[Finding]) -> Result<()> {
    ensure!(
        findings.is_empty(),
        "{} findings:\n{}",
        findings.len(),
        findings.join("\n")
    );
    Ok(())
}

#[test]
fn modules_name_only_what_they_may() -> Result<()> {
    none(&layers::findings(&project()?))
}

#[test]
fn unsafe_code_is_where_it_may_be_and_says_why() -> Result<()> {
    none(&unsafety::unsafe_code(&project()?))
}

#[test]
fn files_and_functions_are_short() -> Result<()> {
    none(&shape::sizes(&project()?))
}

#[test]
fn libraries_do_not_print_and_nothing_is_left_undone() -> Result<()> {
    none(&shape::macros(&project()?))
}

#[test]
fn queues_have_limits() -> Result<()> {
    none(&shape::queues(&project()?))
}

#[test]
fn error_texts_have_one_form() -> Result<()> {
    none(&declared::errors(&project()?))
}

#[test]
fn saved_state_is_kept_apart() -> Result<()> {
    none(&declared::saved_state(&project()?))
}

#[test]
fn every_metric_is_touched() -> Result<()> {
    none(&declared::metrics(&project()?))
}

#[test]
fn no_path_of_one_machine() -> Result<()> {
    let root = root()?;
    none(&declared::words(&project()?, &root.to_string_lossy()))
}
