"""The keys of workflow files of 2024: what they are called today, or why nothing takes their place."""

from typing import NamedTuple


class Rule(NamedTuple):
    """What becomes of an old key."""

    today: str
    """The key of today, or what is said with another one; empty: nothing."""
    reason: str
    ignored: bool = False
    """Whether stock Olive of today takes the file and does not obey the key."""


_BLOCK = Rule("one level up", "today's files have no such block")
_AZURE = Rule("`azureml-job.yml`", "Olive has not run anything on Azure ML since 0.9.3; a job of Azure ML's own does")
_RUNTIME = Rule("", "edgetune keeps checkpoints and logs in gen-model/ and continues by itself")
_TOKEN = Rule("", "tokens come from HF_TOKEN in the environment or in .env, never from this file")
_LOADED = Rule("", "edgetune decides how weights are loaded, by what the machine has")
_ROWS = Rule("", "each row is one example, as long as it is")
_MEASURED = Rule("", "`edgetune verify` and `edgetune evaluate` measure every model")

RULES: dict[str, Rule] = {
    # the file
    "engine": Rule("one level up", "these keys stand at the top of the file today"),
    "config": _BLOCK,
    "params": _BLOCK,
    "extra_args": _BLOCK,
    "params_config": Rule("`load_dataset_config`, `pre_process_data_config`", "the one block became two"),
    "component_kwargs": Rule("`load_dataset_config`, `pre_process_data_config`", "the one block became two"),
    "components": Rule("`load_dataset_config`, `pre_process_data_config`", "the one block became two"),
    "search_strategy": Rule("", "nothing searches by itself; `edgetune export --auto` tries the ways to int4"),
    "disable_search": Rule("", "nothing searches by itself", ignored=True),
    "execution_providers": Rule("`accelerators[].execution_providers`", "it is a property of the machine"),
    "evaluators": _MEASURED,
    "evaluator": _MEASURED,
    "evaluate_input_model": _MEASURED,
    "packaging_config": Rule("", "`edgetune package` assembles what is deployed"),
    "clean_cache": Rule("", "a step is repeated when what it depends on has changed"),
    "clean_run_cache": Rule("", "a step is repeated when what it depends on has changed", ignored=True),
    "pass_flows": Rule("", "the passes run in the order they stand in"),
    "output_dir": Rule("`../gen-model/olive`", "results lie in gen-model/; stock Olive writes into this folder of it"),
    "cache_dir": Rule("`cache`", "git ignores this folder, and `--engine olive` clears it"),
    # base model
    "PyTorchModel": Rule("`HfModel`", "PyTorchModel with hf_config fails when Olive creates the model"),
    "hf_config": Rule("`model_path`, `task`, `load_kwargs`", "today's HfModel has these keys itself"),
    "model_name": Rule("`model_path`", "the id of the base model is the path below model-cache/"),
    "model_path": Rule("`model_path`", "the id of the base model is the path below model-cache/"),
    "from_pretrained_args": Rule("`load_kwargs`", "today's name", ignored=True),
    "model_loading_args": Rule("`load_kwargs`", "today's name", ignored=True),
    "trust_remote_code": Rule(
        "`false`",
        "code that may change is never run, and transformers has the usual architectures itself; "
        "if this model needs its own code, set true beside a revision of 40 digits",
    ),
    "token": _TOKEN,
    "use_auth_token": _TOKEN,
    "hf_token": _TOKEN,
    "device_map": _LOADED,
    "attn_implementation": _LOADED,
    "low_cpu_mem_usage": _LOADED,
    "quantization_config": Rule("", 'for a base model in 4 bits write "type": "QLoRA" in the pass'),
    "quantization_method": Rule("", 'for a base model in 4 bits write "type": "QLoRA" in the pass'),
    "io_config": Rule("", "the model builder knows inputs and outputs", ignored=True),
    "dummy_inputs_func": Rule("", "the model builder needs no sample inputs", ignored=True),
    "azureml_registry_model": _AZURE,
    "azureml_model": _AZURE,
    # machines
    "azureml_client": _AZURE,
    "AzureML": _AZURE,
    "accelerators": Rule(
        "`accelerators: [{device, execution_providers}]`", "Olive takes one accelerator with one execution provider"
    ),
    "conda_file_path": Rule("`setup/conda.yaml`", "versions of 2024 do not run today's Olive"),
    "keyvault_name": Rule("`azureml-job.yml`", "the job takes the token of the Hub from this vault"),
    "aml_compute": _AZURE,
    # data
    "azureml_datastore": Rule("`../datasets/…`, `azureml-job.yml`", "the job puts the file of the datastore there"),
    "azureml_job_output": Rule("`../datasets/…`, `azureml-job.yml`", "the job puts the file there"),
    "data_files": Rule("`../datasets/…`", "a project keeps its rows in datasets/"),
    "data_config": Rule("`data_configs`", "passes name their data"),
    "dataset_type": Rule("", "a text template or a chat template says what a row is", ignored=True),
    "corpus_strategy": Rule("`strategy: line-by-line`", "edgetune learns the answer of each row", ignored=True),
    "strategy": Rule("`strategy: line-by-line`", "edgetune learns the answer of each row"),
    "source_max_len": Rule("`max_seq_len`", "today's name", ignored=True),
    "target_max_len": Rule("`max_seq_len`", "prompt and answer count together", ignored=True),
    "add_special_tokens": Rule(
        "`add_special_tokens: false`", "special tokens stand in the template, where every engine reads the same ones"
    ),
    "text_template": Rule("`text_template`", "Olive added these special tokens; today they stand in the template"),
    "text_cols": Rule("`text_template`", "the columns become a template, so that the text ends with an end token"),
    "input_col": Rule("`text_template`", "the template says what is asked and what is answered", ignored=True),
    "output_col": Rule("`text_template`", "the template says what is asked and what is answered", ignored=True),
    "use_attention_mask": Rule("", "rows are padded within a batch, which needs the mask"),
    "text_formatting_func": Rule("", "a project has no code: write the text as text_template"),
    "user_script": Rule("", "a project has no code: write the text as text_template"),
    "script_dir": Rule("", "a project has no code: write the text as text_template"),
    "dataloader_config": Rule("", "batch sizes stand in training_args"),
    "post_process_data_config": Rule("", "it has no part in fine-tuning"),
    "stride": _ROWS,
    "joiner": _ROWS,
    "random_seed": Rule("", "training_args.data_seed decides on the order of rows"),
    "random_retries": _ROWS,
    "drop_short_sequences": _ROWS,
    "padding_side": _ROWS,
    "processing_batch_size": _ROWS,
    "col_filters": Rule("", "filter the rows in the file itself"),
    # fine-tuning
    "lora_r": Rule("`r`", "today's name", ignored=True),
    "lora_alpha": Rule("`alpha`", "today's name", ignored=True),
    "eval_dataset_size": Rule(
        "`eval_data_config` and a slice of the split", "rows for evaluation are a data set of their own", ignored=True
    ),
    "double_quant": Rule(
        "", 'only QLoRA has a base model in 4 bits; for that write "type": "QLoRA" in the pass', ignored=True
    ),
    "LoftQ": Rule("`QLoRA`", "the base model is in 4 bits too, the adapter starts from zero"),
    "loftq_iter": Rule("", "QLoRA starts from zero"),
    "use_ort_trainer": Rule("", "transformers' Trainer is used", ignored=True),
    "ortmodule_onnx_opset_version": Rule("", "transformers' Trainer is used", ignored=True),
    "allow_tf32": Rule("`training_args.tf32`", "transformers' own name"),
    "torch_dtype": Rule("", "edgetune trains in bfloat16 or float32, whichever the machine is faster with"),
    "compute_dtype": Rule("", "edgetune trains in bfloat16 or float32, whichever the machine is faster with"),
    "evaluation_strategy": Rule("`eval_strategy`", "transformers' name of today", ignored=True),
    "group_by_length": Rule("`train_sampling_strategy: group_by_length`", "gone in transformers 5", ignored=True),
    "warmup_ratio": Rule("`warmup_steps`", "gone in transformers 5; below 1, warmup_steps is a share", ignored=True),
    "bf16": Rule("`torch_dtype: bfloat16`", "the pass says in which type is trained"),
    "fp16": Rule("", "edgetune trains in bfloat16 or float32, whichever the machine is faster with"),
    "per_gpu_train_batch_size": Rule("`per_device_train_batch_size`", "transformers' name of today", ignored=True),
    "per_gpu_eval_batch_size": Rule("`per_device_eval_batch_size`", "transformers' name of today", ignored=True),
    "output_name": Rule("", "results lie in gen-model/", ignored=True),
    "overwrite_output_dir": _RUNTIME,
    "resume_from_checkpoint": _RUNTIME,
    "logging_dir": _RUNTIME,
    "report_to": Rule("", "edgetune knows tensorboard, mlflow, wandb and trackio"),
    # merging and ONNX
    "GenAIModelExporter": Rule("`ModelBuilder`", "today's name"),
    "GptqQuantizer": Rule("`Gptq`", "Olive's own implementation, which the builder takes over"),
    "AutoAWQQuantizer": Rule("`ModelBuilder` with `int4`", "the builder quantises by itself"),
    "OnnxConversion": Rule("`ModelBuilder`", "it converts, optimises and quantises in one step"),
    "OptimumConversion": Rule("`ModelBuilder`", "it converts, optimises and quantises in one step"),
    "OptimumMerging": Rule("`ModelBuilder`", "its model is one file for prompt and answer"),
    "OrtTransformersOptimization": Rule("`ModelBuilder`", "it writes fused operators"),
    "OnnxModelOptimizer": Rule("`ModelBuilder`", "it writes fused operators"),
    "OnnxPeepholeOptimizer": Rule("`ModelBuilder`", "it writes fused operators"),
    "OrtMixedPrecision": Rule("`ModelBuilder` with `fp16`", "the precision is the builder's"),
    "OnnxFloatToFloat16": Rule("`ModelBuilder` with `fp16`", "the precision is the builder's"),
    "OnnxMatMul4Quantizer": Rule("`ModelBuilder` with `int4`", "it uses the same quantiser"),
    "OnnxBnb4Quantization": Rule("`ModelBuilder` with `int4`", "it quantises by itself"),
    "OnnxDynamicQuantization": Rule("`ModelBuilder` with `int4`", "it makes no int8"),
    "OnnxStaticQuantization": Rule("`ModelBuilder` with `int4`", "it makes no int8"),
    "OnnxQuantization": Rule("`ModelBuilder` with `int4`", "it makes no int8"),
    "IncQuantization": Rule("`ModelBuilder` with `int4`", "it makes no int8"),
    "InsertBeamSearch": Rule("", "ONNX Runtime GenAI searches by itself"),
    "OrtPerfTuning": Rule("", "edgetune chooses the threads when it runs a model"),
    "OrtSessionParamsTuning": Rule("", "edgetune chooses the threads when it runs a model"),
    "ExtractAdapters": Rule(
        "no `MergeAdapterWeights`", "without it, the adapter stays in a file of its own beside the exported model"
    ),
    "precision": Rule("`precision`", "the precision has to be one the builder makes for the device"),
    "metadata_only": Rule("", "the model is always written"),
}
"""What becomes of each old key, type or pass. A test holds the table in ``docs/migrating.md`` against this one."""


def table() -> str:
    """Return the rules as Markdown, for ``docs/migrating.md``."""
    rows = ["| in 2024 | today | reason | stock Olive |", "|---|---|---|---|"]
    for key, (today, reason, ignored) in RULES.items():
        rows.append(f"| `{key}` | {today or 'left out'} | {reason} | {'ignores it' if ignored else ''} |")
    return "\n".join(rows)
