#![forbid(unsafe_code)]
//! What monitors hear of the discard gate: which memory may be discarded, who needs that, who was refused.

use serde_json::{Map, Value, json};

use super::Vm;
use crate::memory::discard::{BackendDiscards, DiscardGate, DiscardRefusal, DiscardSource};

impl Vm {
    /// `x-query-discards`
    pub(in crate::qemu) fn query_discards(&self) -> Value {
        let ram = self.held.ram();
        let gate = ram.as_ref().map(|ram| ram.gate());
        let backends: Vec<Value> = (self.listed_objects().into_iter())
            .map(|backend| {
                let holders = gate.map(|gate| gate.holders_of(backend.id()));
                let holders = holders.unwrap_or_default().into_iter();
                let holders: Vec<Value> = holders
                    .map(|holder| {
                        let coordinated = holder.source.is_coordinated();
                        json!({"device": holder.device, "coordinated": coordinated})
                    })
                    .collect();
                json!({
                    "id": backend.id(),
                    "discard": BackendDiscards::of(backend).discards.word(),
                    "required-by": holders,
                })
            })
            .collect();
        let refused: Map<String, Value> = (DiscardSource::ALL.into_iter())
            .map(|source| {
                let count = gate.map_or(0, |gate| gate.refused(source));
                (source.word().to_owned(), json!(count))
            })
            .collect();
        json!({"backends": backends, "refused": refused})
    }

    /// Asks whether all memory may be discarded; why not, where some may not.
    pub(in crate::qemu) fn ask_to_discard(&self, source: DiscardSource) -> Option<DiscardRefusal> {
        let ram = self.held.ram();
        let gate = match &ram {
            Some(ram) => ram.gate(),
            None => &DiscardGate::of(&self.plan.spec),
        };
        (0..gate.backends().len()).find_map(|backend| gate.ask(source, backend, 1).err())
    }

    /// What [`Self::query_discards`] says of memory, for people, behind the list of backends.
    pub(in crate::qemu) fn discards_text(&self) -> String {
        let all = self.query_discards();
        let backends = all["backends"].as_array().into_iter().flatten();
        let word = |value: &Value| value.as_str().unwrap_or("").to_owned();
        backends
            .map(|backend| {
                let holders = backend["required-by"].as_array().into_iter().flatten();
                let holders: String = holders
                    .map(|holder| {
                        let how = match holder["coordinated"].as_bool() {
                            Some(true) => " (coordinated)",
                            _ => "",
                        };
                        format!(", required by {}{how}", word(&holder["device"]))
                    })
                    .collect();
                format!(
                    "discard: {} for {}{holders}\n",
                    word(&backend["discard"]),
                    word(&backend["id"])
                )
            })
            .collect()
    }
}
