//! What a shared pager counts goes to the template that it was for.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "helpers of tests"
)]

mod common;

use common::shared::{start, until};
use common::sys::guest::Guest;
use common::{PAGE, Template};
use metrics_exporter_prometheus::PrometheusBuilder;
use pando_pager::{ClientId, SharedOptions};

#[test]
fn each_template_has_its_own_numbers() {
    let recorder = PrometheusBuilder::new().install_recorder().unwrap();
    let value = |series: &str| -> f64 {
        let text = recorder.render();
        let mut lines = text.lines().filter_map(|line| line.rsplit_once(' '));
        let found = lines.find(|(name, _)| *name == series);
        found.map_or(0.0, |(_, value)| value.parse().unwrap())
    };
    let template = Template::new(64, |page| page.is_multiple_of(2));
    let (pager, _) = start(SharedOptions::default());
    let guests = [("oak", 10), ("elm", 4)].map(|(name, pages)| {
        let image = pager.add_image(template.image(), name).unwrap();
        let guest = Guest::new(64);
        let id = ClientId::new(u64::from(image.number()));
        pager.attach(id, guest.spec(image)).unwrap();
        // Scattered: one message for each.
        for page in (0..pages).map(|page| page * 6 % 64) {
            assert_eq!(guest.read_page(page), template.expected(page));
        }
        guest
    });
    let faults = |template: &str| {
        let series = format!("pando_pager_faults_total{{template=\"{template}\",kind=\"data\"}}");
        value(&series)
    };
    until("all are counted", || faults("oak") + faults("elm") > 13.5);
    assert_eq!((faults("oak").round(), faults("elm").round()), (10.0, 4.0));
    let bytes = value("pando_pager_bytes_read_total{template=\"elm\"}");
    assert!(
        bytes >= (4 * PAGE) as f64 && bytes <= (16 * PAGE) as f64,
        "{bytes}"
    );
    let serving = |template: &str| {
        let path = pager.io().name();
        format!("pando_pager_io_info{{template=\"{template}\",path=\"{path}\"}}")
    };
    let infos = [serving("oak"), serving("elm")];
    assert!(infos.iter().all(|info| value(info) > 0.5));
    drop(pager);
    assert!(infos.iter().all(|info| value(info) < 0.5));
    drop(guests);
}
