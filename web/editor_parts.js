// The elements of the editor of cells: a bar of buttons, the canvas, a readout, and a notice.
const BUTTON = {
  padding: "0 7px",
  minWidth: "28px",
  height: "24px",
  font: "14px/22px sans-serif",
  color: "var(--input-text)",
  background: "var(--comfy-input-bg)",
  border: "1px solid var(--border-color)",
  borderRadius: "5px",
  cursor: "pointer",
}
const NOTE = { font: "12px/16px sans-serif", color: "var(--input-text)" }

function element(tag, style, attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes)
  Object.assign(made.style, style)
  return made
}

function button(label, title, act) {
  const made = element("button", BUTTON, { type: "button", textContent: label, title, onclick: act })
  made.setAttribute("aria-label", title)
  return made
}

/** Shows a button as pressed in. */
export function press(made, pressed) {
  made.setAttribute("aria-pressed", String(pressed))
  made.style.outline = pressed ? "2px solid var(--p-primary-color, #3b82f6)" : ""
  made.style.outlineOffset = "-2px"
}

/** `act`: a function for each button. Returns {root, canvas, readout, notice, buttons}. */
export function buildParts(texts, act) {
  const root = element("div", {
    boxSizing: "border-box",
    display: "flex",
    flexDirection: "column",
    gap: "4px",
    width: "100%",
    height: "100%",
    padding: "2px 6px 4px",
    overflow: "hidden",
  })
  root.className = "glm-image-editor"
  const buttons = {
    run: button("▶", texts.run, act.run),
    rectangle: button("▭", texts.rectangle, act.rectangle),
    brush: button("✎", texts.brush, act.brush),
    mark: button("+", texts.mark, act.mark),
    unmark: button("−", texts.unmark, act.unmark),
    invert: button("◩", texts.invert, act.invert),
    clear: button("✕", texts.clear, act.clear),
    undo: button("↶", texts.undo, act.undo),
  }
  const bar = element("div", { display: "flex", gap: "4px", flexWrap: "wrap" })
  bar.setAttribute("role", "toolbar")
  bar.append(...Object.values(buttons))
  const canvas = element("canvas", {
    position: "absolute",
    inset: "0",
    width: "100%",
    height: "100%",
    outline: "none",
    userSelect: "none",
    touchAction: "none",
  })
  canvas.tabIndex = 0
  canvas.setAttribute("aria-label", texts.label)
  const frame = element("div", { position: "relative", flex: "1 1 0", minHeight: "0" })
  frame.append(canvas)
  const notice = element("div", { ...NOTE, display: "none", gap: "6px", alignItems: "center" })
  notice.setAttribute("aria-live", "polite")
  notice.append(
    element("span", { color: "var(--error-text, #f80)", flex: "1" }, { textContent: texts.stale }),
    button(texts.keep, texts.keep, act.keep),
    button(texts.drop, texts.drop, act.drop)
  )
  const readout = element("div", { ...NOTE, minHeight: "16px" })
  readout.setAttribute("aria-live", "polite")
  root.append(bar, notice, frame, readout)
  for (const type of ["pointerdown", "dblclick", "contextmenu"])
    root.addEventListener(type, (event) => event.stopPropagation())
  return { root, canvas, readout, notice, buttons }
}
