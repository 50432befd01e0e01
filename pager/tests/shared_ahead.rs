//! Pages that a shared pager brings before they are asked for, and what it records of those that are.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "helpers of tests"
)]

mod common;

use std::time::Duration;

use common::shared::{shared_options, slow, start, until};
use common::sys::guest::Guest;
use common::{MODES, Template};
use pando_pager::source::faulty::FaultPlan;
use pando_pager::{
    Budget, ClientEvent, ClientId, ClientSpec, ImageRun, PageCount, PageIndex, PageRange,
    SharedOptions,
};

fn all(_: u64) -> bool {
    true
}

fn every_third(page: u64) -> bool {
    page.is_multiple_of(3)
}

fn pages(start: u64, count: u64) -> PageRange {
    PageRange::new(PageIndex::new(start), PageCount::new(count))
}

fn id(number: u64) -> ClientId {
    ClientId::new(number)
}

#[test]
fn planned_pages_are_brought_and_those_who_fault_are_not_recorded_for_them() {
    let template = Template::new(256, every_third);
    for mode in MODES {
        let (options, _) = shared_options(mode, FaultPlan::default());
        let (pager, told) = start(options);
        let image = pager.add_image(template.image(), "test").unwrap();
        let guest = Guest::new(256);
        let run = |start, count| ImageRun {
            image,
            pages: pages(start, count),
        };
        let spec = ClientSpec {
            ahead: vec![run(100, 50), run(10, 20), run(250, 50)],
            record: Some(100),
            ..guest.spec(image)
        };
        pager.attach(id(4), spec).unwrap();
        let done = || told.lock().unwrap().first().cloned();
        until("the plan is done", || done().is_some());
        let Some(ClientEvent::AheadDone { client, ahead }) = done() else {
            panic!("{:?}", done());
        };
        assert_eq!((client, ahead.pages, ahead.failed_pages), (id(4), 76, 0));
        assert!((100..150).all(|page| guest.is_present(page)));
        let order = [9, 120, 200, 40, 15, 41];
        for page in order {
            assert_eq!(guest.read_page(page), template.expected(page));
        }
        guest.write_word(60, 1);
        let touched: Vec<_> = [9, 200, 40, 41, 60].map(|page| (page, page == 60)).into();
        let trace = pager.trace(id(4)).unwrap();
        let seen = |trace: &pando_pager::working_set::Trace| -> Vec<_> {
            let touches = trace.touches.iter();
            touches
                .map(|touch| (touch.page.get(), touch.write))
                .collect()
        };
        assert_eq!((trace.client, seen(&trace)), (4, touched.clone()));
        pager.detach(id(4));
        assert_eq!(pager.trace(id(4)), None);
        let last = told.lock().unwrap().last().cloned();
        let Some(ClientEvent::Touched { client, trace }) = last else {
            panic!("{last:?}");
        };
        assert_eq!((client, seen(&trace)), (id(4), touched));
    }
}

#[test]
fn demand_comes_before_plans() {
    let template = Template::new(1024, all);
    for mode in MODES {
        let (options, log) = shared_options(mode, slow(Duration::from_millis(2)));
        let (pager, told) = start(SharedOptions {
            budget: Budget {
                ahead_reads: 2,
                ..Budget::shared()
            },
            ..options
        });
        let planned = pager.add_image(template.image(), "test").unwrap();
        let asked = pager.add_image(template.image(), "test").unwrap();
        let (first, second) = (Guest::new(1024), Guest::new(1024));
        let spec = ClientSpec {
            ahead: vec![ImageRun {
                image: planned,
                pages: pages(0, 1024),
            }],
            ..first.spec(planned)
        };
        pager.attach(id(1), spec).unwrap();
        pager.attach(id(2), second.spec(asked)).unwrap();
        for page in [700, 3, 90] {
            assert_eq!(second.read_page(page), template.expected(page));
            assert_eq!(first.read_page(page), template.expected(page));
        }
        until("the plan is done", || !told.lock().unwrap().is_empty());
        assert!(
            (0..1024).all(|page| first.is_present(page)),
            "all were planned"
        );
        let log = log.lock().unwrap();
        let asked = asked.number() as usize;
        let last = log.iter().rposition(|&image| image == asked).unwrap();
        assert!(
            last + 4 < log.len(),
            "demand did not wait for the plan: {log:?}"
        );
    }
}

#[test]
fn pages_ahead_of_walks_are_judged_once() {
    let template = Template::new(512, all);
    for mode in MODES {
        let (options, _) = shared_options(mode, FaultPlan::default());
        let (pager, _) = start(options);
        let image = pager.add_image(template.image(), "test").unwrap();
        let guests: Vec<Guest> = (0..3).map(|_| Guest::new(512)).collect();
        for (number, guest) in (0..).zip(&guests) {
            pager.attach(id(number), guest.spec(image)).unwrap();
            for page in 0..512 {
                assert_eq!(guest.read_page(page), template.expected(page));
            }
        }
        (0..3).for_each(|number| pager.detach(id(number)));
        let counts = pager.counts();
        let ahead = 3 * 512 - counts.faults_data;
        let judged = counts.prefetch_useful + counts.prefetch_wasted + counts.prefetch_late;
        assert_eq!(judged, ahead, "{counts:?}");
        assert!(counts.prefetch_useful > 3 * 450, "{counts:?}");
    }
}
