#![forbid(unsafe_code)]
//! Proves what a client asks for. Pure.

use thiserror::Error;

use super::spec::{ClientRegion, ImageId, MAX_FORGOTTEN_PAGES, MAX_REGIONS};
use crate::page::{PAGE_BYTES, PageCount, PageIndex, PageRange};

/// Why a client is refused.
#[derive(Debug, Error)]
pub enum SpecError {
    /// Nothing to serve.
    #[error("it has no regions; name at least one")]
    NoRegions,
    /// More than [`MAX_REGIONS`].
    #[error("it has {count} regions; join neighbours, {MAX_REGIONS} are the limit")]
    TooManyRegions {
        /// How many.
        count: usize,
    },
    /// A region without a page.
    #[error("its region at {address:#x} has no pages; leave it out")]
    Empty {
        /// Where.
        address: u64,
    },
    /// An address inside a page.
    #[error("its region at {address:#x} does not begin at a multiple of {PAGE_BYTES}")]
    Unaligned {
        /// Where.
        address: u64,
    },
    /// A region beyond the end of all addresses.
    #[error("its region at {address:#x} reaches beyond the last address")]
    Beyond {
        /// Where.
        address: u64,
    },
    /// An image that this pager was not given.
    #[error("this pager has no {image}; add it first")]
    UnknownImage {
        /// Which.
        image: ImageId,
    },
    /// Pages that the image has not.
    #[error("{image} has {} pages, but {pages} are asked for", image_pages.get())]
    Outside {
        /// Which image.
        image: ImageId,
        /// What was asked for.
        pages: PageRange,
        /// What there is.
        image_pages: PageCount,
    },
    /// Two regions in one place.
    #[error("its regions at {first:#x} and {second:#x} lie over each other")]
    Overlap {
        /// The lower one.
        first: u64,
        /// The higher one.
        second: u64,
    },
    /// Pages of an image in two regions: so each client has at most as many as its images.
    #[error(
        "its regions at {first:#x} and {second:#x} both have {page} of {image}; name each page once"
    )]
    Twice {
        /// One of them.
        first: u64,
        /// The other.
        second: u64,
        /// Of which image.
        image: ImageId,
        /// The first page that both have.
        page: PageIndex,
    },
    /// A shard that there is not.
    #[error("there is no shard {shard}: this pager has {shards}")]
    UnknownShard {
        /// Which.
        shard: usize,
        /// How many there are.
        shards: usize,
    },
    /// The id belongs to a client that is served.
    #[error("its id is in use; detach that client first")]
    Duplicate,
    /// No client of that id.
    #[error("there is no such client: it was never attached, or is gone")]
    Unknown,
    /// More than [`MAX_FORGOTTEN_PAGES`] at once.
    #[error(
        "{pages} pages or more are to be forgotten at once; send several orders of {MAX_FORGOTTEN_PAGES} at most"
    )]
    TooManyForgotten {
        /// How many there are at least, counted for each region that has them.
        pages: u64,
    },
    /// The shard has as many as it can.
    #[error("the shard serves {limit} clients, which is its limit; use another shard or pager")]
    Full {
        /// How many.
        limit: usize,
    },
    /// What is to be the map of its discarded pages is none.
    #[error("its map of discarded pages cannot be used")]
    Discards(#[source] std::io::Error),
    /// Its userfaultfd cannot do what serving takes.
    #[error("its userfaultfd cannot be used: {what}")]
    Uffd {
        /// What is wrong.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// Proves `regions` and sorts them by address. `pages_of` says how many pages an image has.
pub fn check_regions(
    regions: &mut [ClientRegion],
    pages_of: impl Fn(ImageId) -> Option<PageCount>,
) -> Result<(), SpecError> {
    if regions.is_empty() {
        return Err(SpecError::NoRegions);
    }
    if regions.len() > MAX_REGIONS {
        let count = regions.len();
        return Err(SpecError::TooManyRegions { count });
    }
    for region in &*regions {
        check_one(region, &pages_of)?;
    }
    regions.sort_by_key(|region| region.address);
    for two in regions.windows(2) {
        if two[0].end().is_none_or(|end| end > two[1].address) {
            return Err(SpecError::Overlap {
                first: two[0].address,
                second: two[1].address,
            });
        }
    }
    check_pages(regions)
}

/// Proves that no page of an image is in two regions.
fn check_pages(regions: &[ClientRegion]) -> Result<(), SpecError> {
    let mut by_page: Vec<&ClientRegion> = regions.iter().collect();
    by_page.sort_by_key(|region| (region.image, region.pages.start()));
    for two in by_page.windows(2) {
        let (before, after) = (two[0], two[1]);
        if before.image == after.image && before.pages.end() > after.pages.start() {
            return Err(SpecError::Twice {
                first: before.address,
                second: after.address,
                image: after.image,
                page: after.pages.start(),
            });
        }
    }
    Ok(())
}

fn check_one(
    region: &ClientRegion,
    pages_of: &impl Fn(ImageId) -> Option<PageCount>,
) -> Result<(), SpecError> {
    let &ClientRegion {
        image,
        address,
        pages,
    } = region;
    if pages.is_empty() {
        return Err(SpecError::Empty { address });
    }
    if !address.is_multiple_of(PAGE_BYTES) {
        return Err(SpecError::Unaligned { address });
    }
    if region.end().is_none() {
        return Err(SpecError::Beyond { address });
    }
    let image_pages = pages_of(image).ok_or(SpecError::UnknownImage { image })?;
    if pages.end().get() > image_pages.get() {
        return Err(SpecError::Outside {
            image,
            pages,
            image_pages,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn region(image: u32, address: u64, start: u64, count: u64) -> ClientRegion {
        ClientRegion {
            image: ImageId::new(image),
            address,
            pages: PageRange::new(PageIndex::new(start), PageCount::new(count)),
        }
    }

    /// Two images, of 10 and of 4 pages.
    fn pages_of(image: ImageId) -> Option<PageCount> {
        [10, 4].get(image.index()).copied().map(PageCount::new)
    }

    fn refused(mut regions: Vec<ClientRegion>) -> String {
        check_regions(&mut regions, pages_of)
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_name() {
        assert!(refused(vec![]).contains("no regions"));
        assert!(refused(vec![region(0, 0x1000, 0, 1); MAX_REGIONS + 1]).contains("4097 regions"));
        assert!(refused(vec![region(0, 0x1000, 3, 0)]).contains("0x1000 has no pages"));
        assert!(refused(vec![region(0, 0x1001, 0, 1)]).contains("0x1001 does not begin"));
        assert!(refused(vec![region(0, u64::MAX - 4095, 0, 1)]).contains("beyond"));
        assert!(refused(vec![region(2, 0x1000, 0, 1)]).contains("no image 2"));
        assert!(refused(vec![region(1, 0x1000, 3, 2)]).contains("image 1 has 4 pages"));
        let over = refused(vec![region(1, 0x5000, 0, 1), region(0, 0x1000, 0, 5)]);
        assert!(over.contains("0x1000 and 0x5000"), "{over}");
        let twice = refused(vec![region(0, 0x1000, 0, 5), region(0, 0x9000, 4, 3)]);
        assert!(twice.contains("0x1000 and 0x9000 both have"), "{twice}");
        assert!(twice.contains("4 of image 0"), "{twice}");
    }

    #[test]
    fn good_regions_are_sorted() {
        let mut regions = vec![
            region(1, 0x6000, 0, 4),
            region(0, 0x1000, 5, 5),
            region(0, 0xa000, 0, 5),
        ];
        check_regions(&mut regions, pages_of).unwrap();
        assert_eq!(regions[0].address, 0x1000);
    }

    proptest! {
        #[test]
        fn accepted_regions_never_share_an_address_or_a_page(
            raw in prop::collection::vec((0u32..3, 0u64..20, 0u64..12, 0u64..6), 0..6),
        ) {
            let mut regions: Vec<_> = raw
                .iter()
                .map(|&(image, page, start, count)| region(image, page * PAGE_BYTES, start, count))
                .collect();
            if check_regions(&mut regions, pages_of).is_ok() {
                let mut seen = std::collections::HashSet::new();
                let mut named = std::collections::HashSet::new();
                for region in &regions {
                    prop_assert!(region.pages.end().get() <= pages_of(region.image).unwrap().get());
                    for page in 0..region.pages.count().get() {
                        prop_assert!(seen.insert(region.address / PAGE_BYTES + page));
                        prop_assert!(named.insert((region.image, region.pages.start().get() + page)));
                    }
                }
            }
        }
    }
}
