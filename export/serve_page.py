"""The chat page of `distill serve`: one self-contained document that talks to its own server and to nothing else.

What a model writes is only ever set as text. The content policy names the one script and the one style sheet by their
hashes, and refuses markup made from text even to them.
"""

import base64
import hashlib

STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { margin: 0 auto; max-width: 48rem; padding: 1rem; display: flex; flex-direction: column; min-height: 100dvh;
  box-sizing: border-box; gap: 1rem }
header { display: flex; gap: 1rem; align-items: baseline; flex-wrap: wrap }
h1 { font-size: 1.1rem; margin: 0; flex: 1; overflow-wrap: anywhere }
main { flex: 1; display: flex; flex-direction: column; gap: 1rem }
article { white-space: pre-wrap; overflow-wrap: anywhere; padding: .6rem .9rem; border-radius: .6rem }
.user { background: color-mix(in srgb, CanvasText 10%, Canvas); align-self: flex-end; max-width: 85% }
.trouble { border: 1px solid #c33 }
details { opacity: .75; margin-bottom: .5rem }
summary { cursor: pointer }
form { display: flex; gap: .5rem; position: sticky; bottom: 0; background: Canvas; padding: .5rem 0 1rem }
textarea { flex: 1; font: inherit; padding: .5rem; border-radius: .5rem; resize: vertical; min-height: 3rem }
button, input { font: inherit; padding: .4rem .8rem; border-radius: .5rem }
button { cursor: pointer }
.secret { -webkit-text-security: disc }
"""

SCRIPT = """
'use strict'
const at = id => document.getElementById(id)
const chat = []
let model = '', running = null

function part(parent, tag, name) {
  const element = document.createElement(tag)
  if (name) element.className = name
  parent.append(element)
  return element
}

function headers() {
  const key = at('key').value
  return {'Content-Type': 'application/json', ...(key ? {Authorization: 'Bearer ' + key} : {})}
}

async function failure(response) {
  const told = await response.json().catch(() => null)
  return told?.error?.message ?? 'the server answered ' + response.status
}

async function findModel() {
  const response = await fetch('v1/models', {headers: headers()})
  if (!response.ok) throw Error(await failure(response))
  model = (await response.json()).data[0].id
  at('name').textContent = model
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  let held = ''
  for (;;) {
    const {value, done} = await reader.read()
    if (done) return
    const lines = (held + value).split('\\n\\n')
    held = lines.pop()
    for (const line of lines) {
      const data = line.replace(/^data: /, '')
      if (data === '[DONE]') return
      yield JSON.parse(data)
    }
  }
}

function answerBox() {
  const box = part(at('chat'), 'article', 'assistant')
  const details = part(box, 'details')
  details.hidden = true
  part(details, 'summary').textContent = 'Reasoning'
  return {box, details, reasoning: part(details, 'div', 'reasoning'), content: part(box, 'div', 'content')}
}

async function answer(box) {
  if (!model) await findModel()
  const body = JSON.stringify({model, messages: chat, stream: true})
  const order = {method: 'POST', headers: headers(), body, signal: running.signal}
  const response = await fetch('v1/chat/completions', order)
  if (!response.ok) throw Error(await failure(response))
  for await (const event of events(response)) {
    if (event.error) throw Error(event.error.message)
    const delta = event.choices[0]?.delta ?? {}
    if (delta.reasoning_content) {
      box.details.hidden = false
      box.reasoning.append(delta.reasoning_content)
    }
    if (delta.content) box.content.append(delta.content)
    if (at('end').getBoundingClientRect().top < innerHeight + 200) at('end').scrollIntoView()
  }
}

async function send(text) {
  running = new AbortController()
  document.body.dataset.state = 'writing'
  at('send').textContent = 'Stop'
  chat.push({role: 'user', content: text})
  part(at('chat'), 'article', 'user').textContent = text
  const box = answerBox()
  try {
    await answer(box)
  } catch (error) {
    if (error.name !== 'AbortError') part(box.box, 'div', 'trouble').textContent = error.message
  }
  if (box.content.textContent) chat.push({role: 'assistant', content: box.content.textContent})
  else chat.pop()
  running = null
  at('send').textContent = 'Send'
  document.body.dataset.state = 'ready'
  at('text').focus()
}

at('form').addEventListener('submit', event => {
  event.preventDefault()
  const text = at('text').value.trim()
  if (running) running.abort()
  else if (text) {
    at('text').value = ''
    send(text)
  }
})
at('text').addEventListener('keydown', event => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault()
    if (!running) at('form').requestSubmit()
  }
})
at('new').addEventListener('click', () => {
  running?.abort()
  chat.length = 0
  at('chat').replaceChildren()
})
at('key').addEventListener('change', () => { model = ''; findModel().catch(() => {}) })
findModel().catch(error => { at('name').textContent = error.message })
document.body.dataset.state = 'ready'
"""


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src '{_hash(SCRIPT)}'; style-src '{_hash(STYLE)}'; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}

PAGE = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>distill chat</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body><header><h1 id="name">…</h1><label>Key
<input id="key" class="secret" autocomplete="off" spellcheck="false" size="12"></label>
<button id="new" type="button">New chat</button></header>
<main id="chat" aria-live="polite"></main><div id="end"></div>
<form id="form"><textarea id="text" aria-label="Message" autofocus placeholder="Message"></textarea>
<button id="send" type="submit">Send</button></form>
<script>{SCRIPT}</script></body></html>
"""
