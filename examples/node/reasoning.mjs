// Reasoning and answer of a text that may still be growing; `opened`: the prompt held the opening marker.

const OPEN = "<think>";
const CLOSE = "</think>";

export function split(text, opened = false) {
  const close = text.lastIndexOf(CLOSE);
  if (close >= 0) {
    const reasoning = text.slice(0, close).replace(OPEN, "").trim();
    return { reasoning, answer: text.slice(close + CLOSE.length).trimStart() };
  }
  const start = text.trimStart();
  if (opened || start.startsWith(OPEN)) return { reasoning: start.replace(OPEN, "").trimStart(), answer: "" };
  return { reasoning: "", answer: OPEN.startsWith(start) ? "" : text };
}

export const opensReasoning = (prompt) => prompt.trimEnd().endsWith(OPEN);
