"""The student stage: traces in, a small Llama or Qwen checkpoint out."""
