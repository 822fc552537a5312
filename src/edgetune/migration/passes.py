"""Passes: fine-tuning under today's names, then merge, then the model builder for whatever made ONNX."""

from collections.abc import Mapping
from typing import Any

from edgetune.adapter_inputs import MODULES
from edgetune.migration.data import split_off
from edgetune.migration.draft import Draft, Old, Part, Section, free_name
from edgetune.migration.names import RULES
from edgetune.schema import PRECISIONS, DoRA, Gptq, LoRA, ModelBuilder, QLoRA
from edgetune.source import Location
from edgetune.training_schema import TRACKERS, TrainingArguments

_TUNING: dict[str, type[LoRA | DoRA | QLoRA]] = {"lora": LoRA, "dora": DoRA, "qlora": QLoRA, "loftq": QLoRA}
_RENAMED = {"lora_r": "r", "lora_alpha": "alpha"}
_FP16 = ("ortmixedprecision", "onnxfloattofloat16")
_INT4 = (
    "onnxmatmul4quantizer",
    "onnxbnb4quantization",
    "onnxdynamicquantization",
    "onnxstaticquantization",
    "onnxquantization",
    "incquantization",
    "autoawqquantizer",
)
_PLAIN = (
    "onnxconversion",
    "optimumconversion",
    "optimummerging",
    "orttransformersoptimization",
    "onnxmodeloptimizer",
    "onnxpeepholeoptimizer",
    "insertbeamsearch",
    "ortperftuning",
    "ortsessionparamstuning",
)
_OPTIONS = {
    "block_size": "int4_block_size",
    "accuracy_level": "int4_accuracy_level",
    "nodes_to_exclude": "int4_nodes_to_exclude",
    "is_symmetric": "int4_is_symmetric",
}
_CANONICAL = {key.lower(): key for key in RULES}
_BLOCKS = ("config",)
_OF_A_RUN = ("disable_search", "evaluator", "host", "clean_run_cache", "output_name", "user_script", "script_dir")


class Passes:
    """The passes of the new file, found one after the other in the old one."""

    def __init__(self, draft: Draft, provider: str, data: list[Part], names: Mapping[str, str]) -> None:
        self.draft, self.provider, self.data, self.names = draft, provider, data, names
        self.tuning = dict[str, Part]()
        self.merge = dict[str, Part]()
        self.gptq = dict[str, Part]()
        self.builder = dict[str, Part]()
        self.onnx: Part | None = None
        """What passes that made or changed ONNX ask of the builder."""
        self.extract: Location | None = None
        """Where the old file asks for the adapter in a file of its own."""

    def read(self, top: Section) -> Part:
        """Return today's ``passes``."""
        place: Location = top.places.get("passes", ())
        given = top.section("passes")
        names = list(given.places) if given else []
        for name in names:
            at = given.places[name] if given else ()
            if isinstance(alternatives := self.draft.at(at), list):
                for number in range(1, len(alternatives)):
                    self.draft.left_out((*at, number), "edgetune tries no alternatives: the first one is taken")
                at = (*at, 0)
            self._one(name, Section(self.draft, at, _BLOCKS))
        return self._in_order(place)

    def _one(self, name: str, given: Section) -> None:
        old = given.take("type")
        kind = str(old.value) if old else ""
        at = old.place if old else given.place
        for key in _OF_A_RUN:
            if found := given.take(key):
                self.draft.left_out(found.place, "it runs where edgetune runs" if key == "host" else "")
        if kind.lower() in _TUNING:
            self.tuning[name] = self._tune(given, kind, at)
        elif kind.lower() == "mergeadapterweights":
            self.merge[name] = _typed(given, "MergeAdapterWeights", at)
        elif kind.lower() in ("gptq", "gptqquantizer"):
            self.gptq[name] = self._gptq(given, kind, at)
        elif kind.lower() in ("modelbuilder", "genaimodelexporter"):
            self.builder[name] = self._build(given, kind, at)
        elif kind.lower() == "extractadapters":
            self.extract = at
        elif kind.lower() in (*_FP16, *_INT4, *_PLAIN):
            self._collect(given, kind, at)
        else:
            hint = "take the pass out of the old file if the model can do without it, or run the file with stock Olive"
            self.draft.refused(at, f"edgetune has nothing in the place of {kind or 'a pass without type'!r}", hint)
        given.leave_rest(reason="the pass of today has no such key")

    def _tune(self, given: Section, kind: str, at: Location) -> Part:
        model = _TUNING[kind.lower()]
        part = _typed(given, model.__name__, at)
        if kind.lower() == "loftq":
            self.draft.changed(at, "LoftQ")
        elif kind != model.__name__:
            self.draft.changed(at, "", f"`{model.__name__}`", "edgetune tells capital letters from small ones")
        for key, today in _RENAMED.items():
            if old := given.take(key):
                self.draft.changed(old.place, key, f"`{today}: {old.value}`")
                if today in given:
                    self.draft.left_out(given.places.pop(today), f"{key} stands beside it")
                part.put(today, old.value, old.place)
        given.carry(
            part, [key for key in model.model_fields if key in ("r", "alpha", "lora_dropout", "target_modules")]
        )
        arguments = given.section("training_args", "extra_args")
        training = self._training(arguments, part) if arguments else Part(at)
        if tf32 := given.take("allow_tf32"):
            self.draft.changed(tf32.place, "allow_tf32")
            training.put("tf32", tf32.value, tf32.place)
        for key in ("torch_dtype", "compute_dtype"):
            self._dtype(given, key, part, model)
        given.carry(part, [key for key in ("quant_type", "double_quant") if key in model.model_fields])
        self._data_of(given, part)
        if training:
            part.put("training_args", training, training.place)
        return part

    def _dtype(self, given: Section, key: str, part: Part, model: Any) -> None:
        if key not in model.model_fields:
            return
        old = given.take(key)
        if old and old.value in ("bfloat16", "float32"):
            part.put(key, old.value, old.place)
        elif old:
            self.draft.left_out(old.place)

    def _data_of(self, given: Section, part: Part) -> None:
        for key in ("train_data_config", "eval_data_config"):
            if old := given.take(key):
                part.put(key, self.names.get(str(old.value), old.value), old.place)
        if "train_data_config" not in part and len(self.data) == 1:
            part.put("train_data_config", self.data[0]["name"])
            self.draft.changed(given.place, "data_config", f"`train_data_config: {self.data[0]['name']}`")
        size = given.take("eval_dataset_size")
        if size is None:
            return
        data = next((one for one in self.data if one["name"] == part.get("train_data_config")), None)
        if part.get("eval_data_config"):
            self.draft.left_out(size.place, "eval_data_config says which rows are for evaluation")
        elif data is not None and (rest := split_off(self.draft, data, size, {one["name"] for one in self.data})):
            self.data.insert(self.data.index(data) + 1, rest)
            part.put("eval_data_config", rest["name"], size.place)

    def _training(self, given: Section, tuning: Part) -> Part:
        part = Part(given.place)
        for old_key, key in (
            ("evaluation_strategy", "eval_strategy"),
            ("warmup_ratio", "warmup_steps"),
            ("per_gpu_train_batch_size", "per_device_train_batch_size"),
            ("per_gpu_eval_batch_size", "per_device_eval_batch_size"),
        ):
            old = given.take(old_key)
            if old and given.places.get(key) and self.draft.at(given.places[key]):
                self.draft.left_out(old.place, f"{key} stands beside it")
            elif old:
                if unset := given.take(key):
                    self.draft.left_out(unset.place, f"{old_key} stands beside it")
                self.draft.changed(old.place, old_key, f"`{key}: {old.value}`")
                part.put(key, old.value, old.place)
        if old := given.take("group_by_length"):
            if old.value is True and "train_sampling_strategy" not in given:
                self.draft.changed(old.place, "group_by_length")
                part.put("train_sampling_strategy", "group_by_length", old.place)
            else:
                self.draft.left_out(old.place, "not to group is the default")
        if (old := given.take("bf16")) and old.value is True:
            self.draft.changed(old.place, "bf16")
            tuning.put("torch_dtype", "bfloat16", old.place)
        elif old:
            self.draft.left_out(old.place, "the pass's torch_dtype says in which type is trained")
        self._trackers(given, part)
        given.carry(part, [key for key in TrainingArguments.model_fields if key in given])
        given.leave_rest(TrainingArguments.model_fields, "edgetune does not pass this argument on")
        return part

    def _trackers(self, given: Section, part: Part) -> None:
        old = given.take("report_to")
        if old is None:
            return
        names = old.value if isinstance(old.value, list) else [old.value]
        kept = [name for name in names if name in (*TRACKERS, "none")]
        if kept != names:
            self.draft.left_out(old.place)
        if kept:
            part.put("report_to", kept if isinstance(old.value, list) else kept[0], old.place)

    def _gptq(self, given: Section, kind: str, at: Location) -> Part:
        part = _typed(given, "Gptq", at)
        if kind.lower() != "gptq":
            self.draft.changed(at, "GptqQuantizer")
        given.carry(part, [key for key in Gptq.model_fields if key not in ("type", "data_config")])
        data = given.take("data_config")
        if data is not None:
            part.put("data_config", self.names.get(str(data.value), data.value), data.place)
        elif self.data:
            part.put("data_config", self.data[0]["name"])
            self.draft.changed(
                given.place, "data_config", f"`data_config: {self.data[0]['name']}`", "the rows trained on"
            )
        return part

    def _build(self, given: Section, kind: str, at: Location) -> Part:
        part = _typed(given, "ModelBuilder", at)
        if kind.lower() != "modelbuilder":
            self.draft.changed(at, "GenAIModelExporter")
        precision = given.take("precision")
        part.put("precision", self._precision(precision), precision.place if precision else None)
        if (level := given.take("int4_accuracy_level")) and level.value == 0:
            self.draft.left_out(level.place, "0 means that ONNX Runtime chooses, as it does without the key")
        elif level:
            part.put("int4_accuracy_level", level.value, level.place)
        given.carry(part, [key for key in ModelBuilder.model_fields if key not in ("type", "precision")])
        given.leave_rest(ModelBuilder.model_fields, "edgetune does not hand this option to the builder")
        return part

    def _precision(self, old: Old | None) -> str:
        wanted = str(old.value).lower() if old else "int4"
        possible = PRECISIONS[self.provider]
        precision = wanted if wanted in possible else "int4" if wanted in ("int4", "int8") else "fp32"
        precision = precision if precision in possible else possible[-1]
        if old and precision != old.value:
            reason = f"for {self.provider} there are {', '.join(possible)}"
            self.draft.changed(old.place, "precision", f"`precision: {precision}`", reason)
        return precision

    def _collect(self, given: Section, kind: str, at: Location) -> None:
        """Remember what a pass that made ONNX did; the builder does it in one step."""
        name = _CANONICAL.get(kind.lower(), kind)
        if RULES[name].today:
            self.draft.changed(at, name)
        else:
            self.draft.left_out(at, RULES[name].reason)
        if self.onnx is None:
            self.onnx = Part(at)
            self.onnx.put("type", "ModelBuilder", at)
            self.onnx.put("precision", "fp32", at)
        half = (old := given.take("float16")) is not None and old.value is True
        if old and half:
            self.draft.changed(old.place, "precision", "`precision: fp16`", "unless a later pass makes it int4")
        elif old:
            self.draft.left_out(old.place, "fp32 is what remains without it")
        if kind.lower() in _INT4:
            self.onnx.put("precision", "int4", at)
        elif self.onnx["precision"] != "int4" and (kind.lower() in _FP16 or half):
            self.onnx.put("precision", "fp16", at)
        if kind.lower() != "onnxmatmul4quantizer":
            given.leave_rest(reason="the builder needs no such option")
            return
        for key, today in _OPTIONS.items():
            if option := given.take(key):
                self.draft.changed(option.place, key, f"`{today}: {option.value}`", "the builder's name")
                self.onnx.put(today, option.value, option.place)
        given.leave_rest(reason="the builder needs no such option")

    def _in_order(self, place: Location) -> Part:
        """Put the passes into the order the engine runs them in; add what a project does in any case."""
        self._complete_merge(place)
        self._complete_export(place)
        new = Part(place)
        for group in (self.tuning, self.merge, self.gptq, self.builder):
            for name, part in group.items():
                new.put(name, part, part.place)
        return new

    def _complete_merge(self, place: Location) -> None:
        if self.extract is not None and not self.merge and self._fits_beside():
            self.draft.changed(self.extract, "ExtractAdapters")
            return
        if self.extract is not None:
            why = "what is trained is merged, or cannot stay beside the exported model (docs/adapters.md)"
            self.draft.left_out(self.extract, why)
        if self.tuning and not self.merge:
            self._add(self.merge, "merge_adapter_weights", _typed_at("MergeAdapterWeights", place))
            self.draft.changed(place, "", "with MergeAdapterWeights", "the exported model has the adapter inside")
        if self.merge and not self.tuning:
            for part in self.merge.values():
                self.draft.left_out(part.place, "there is no adapter to merge")
            self.merge.clear()

    def _fits_beside(self) -> bool:
        """Tell whether the adapter can be in a file beside the exported model: others are refused there."""
        builder: Mapping[str, Any] = next(iter(self.builder.values()), {})
        tuning: Mapping[str, Any] = next(iter(self.tuning.values()), {})
        modules = tuning.get("target_modules", [])
        return (
            tuning.get("type") == "LoRA"
            and not self.gptq
            and builder.get("precision") != "bf16"
            and builder.get("use_cuda_bf16") is not True
            and isinstance(modules, list)
            and all(str(name).rpartition(".")[2] in MODULES for name in modules)
        )

    def _complete_export(self, place: Location) -> None:
        if self.builder and self.onnx is not None:
            self.draft.changed(self.onnx.place, "", "the ModelBuilder that is there", "it writes the whole model")
        elif not self.builder:
            self._add(self.builder, "builder", self._default_builder(place))
        for part in self.builder.values():
            if self.gptq and part["precision"] != "int4":
                self.draft.changed(part.places["precision"], "", "`precision: int4`", "what Gptq makes is int4")
                part["precision"] = "int4"

    def _add(self, group: dict[str, Part], name: str, part: Part) -> None:
        group[free_name(name, {*self.tuning, *self.merge, *self.gptq, *self.builder})] = part

    def _default_builder(self, place: Location) -> Part:
        part = self.onnx
        if part is None:
            part = _typed_at("ModelBuilder", place)
            part.put("precision", "int4")
            self.draft.changed(place, "", "with ModelBuilder, int4", "a project ends in an ONNX model")
        elif part["precision"] not in PRECISIONS[self.provider]:
            part["precision"] = self._precision(Old(part["precision"], part.places["precision"]))
        if part["precision"] == "int4" and self.provider == "CPUExecutionProvider" and not self.gptq:
            for key, value in (("int4_block_size", 128), ("int4_accuracy_level", 4)):
                if key not in part:
                    part.put(key, value, part.place)
        return part


def _typed(given: Section, kind: str, at: Location) -> Part:
    part = Part(given.place)
    part.put("type", kind, at)
    return part


def _typed_at(kind: str, place: Location) -> Part:
    part = Part(place)
    part.put("type", kind)
    return part
