#![forbid(unsafe_code)]
//! Memory backends: what QEMU does with them case by case, and guests that run on several.

mod cases;
mod guest;
mod words;
