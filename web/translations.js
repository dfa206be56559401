// Puts the pack's translations into its nodes. Pages of ComfyUI 0.3.75's time read them from the
// server and lose them when they load the language itself; later pages do it on their own and come
// to the same texts.
import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

const PREFIX = "GLMImage"
let texts = {}

function translateDef(def, told) {
  def.display_name = told.display_name
  def.description = told.description
  def.category = def.category
    .split("/")
    .map((part) => texts.nodeCategories?.[part] ?? part)
    .join("/")
  for (const inputs of Object.values(def.input ?? {}))
    for (const [name, spec] of Object.entries(inputs))
      if (told.inputs?.[name]?.tooltip && spec[1]) spec[1].tooltip = told.inputs[name].tooltip
  def.output_tooltips = def.output.map(
    (_, i) => told.outputs?.[i]?.tooltip ?? def.output_tooltips?.[i]
  )
}

function translateNode(node, told) {
  const nameOf = (slot) => told.inputs?.[slot.name]?.name
  for (const input of node.inputs ?? []) input.localized_name = nameOf(input) ?? input.localized_name
  for (const widget of node.widgets ?? []) widget.label = nameOf(widget) ?? widget.label
  node.outputs?.forEach((output, i) => {
    output.localized_name = told.outputs?.[i]?.name ?? output.localized_name
  })
}

app.registerExtension({
  name: "GLMImage.translations",
  async addCustomNodeDefs(defs) {
    const locale = app.extensionManager.setting.get("Comfy.Locale")
    texts = (await api.getCustomNodesI18n())[locale] ?? {}
    for (const [id, def] of Object.entries(defs))
      if (id.startsWith(PREFIX) && texts.nodeDefs?.[id]) translateDef(def, texts.nodeDefs[id])
  },
  nodeCreated(node) {
    const told = node.comfyClass?.startsWith(PREFIX) && texts.nodeDefs?.[node.comfyClass]
    if (told) translateNode(node, told)
  },
})
