#![forbid(unsafe_code)]
//! Memory backends: what QEMU does with them case by case, and guests that run on several.

#[cfg(test)]
mod cases;
#[cfg(test)]
mod guest;
#[cfg(test)]
mod words;
