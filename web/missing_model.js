// Tells, when a graph is opened, which of its models the server does not have.
// The page itself knows missing files only; GLM-Image is a folder.
import { app } from '../../scripts/app.js'

const NAME = 'GLM-Image'
const COMMAND = `hf download zai-org/GLM-Image --local-dir ComfyUI/models/glm_image/${NAME}`
const TEXTS = {
  en: {
    summary: name => `Model ${name} is not installed`,
    download: `In the folder that holds ComfyUI, run (36 GB):\n${COMMAND}\nThen press R.`,
    choose: 'Choose another in the loaders, or put it into models/glm_image and press R.'
  },
  zh: {
    summary: name => `未安装模型 ${name}`,
    download: `在 ComfyUI 所在的文件夹中运行(36 GB)：\n${COMMAND}\n然后按 R 键。`,
    choose: '请在加载节点中选择其他模型，或将其放入 models/glm_image 后按 R 键。'
  }
}
const told = new Set()

/** Each loader of a graph and of the subgraphs in it, with the model's name that it will get. */
function* loaders(graph, host) {
  for (const node of graph.nodes) {
    if (node.subgraph) yield* loaders(node.subgraph, node)
    const widget = node.widgets?.find(widget => widget.name === 'model_name')
    if (!widget || !node.type?.startsWith('GLMImage')) continue
    const { link } = node.inputs?.find(input => input.widget?.name === 'model_name') ?? {}
    const from = link != null && graph.inputs?.find(input => input.linkIds.includes(link))
    const shown = from && host?.widgets?.find(widget => widget.name === from.name)
    yield [node, (shown || widget).value]
  }
}

/** The names that the server listed for a combo when the page was loaded or refreshed. */
function listed(node, input) {
  const [values, options] = node.constructor.nodeData?.input?.required?.[input] ?? []
  return Array.isArray(values) ? values : options?.options
}

/** A name as the server compares it: a graph from Windows has backslashes. */
const plain = name => String(name).replaceAll('\\', '/')

function missingModels(graph) {
  const missing = new Set()
  for (const [node, name] of loaders(graph)) {
    const names = listed(node, 'model_name')?.map(plain)
    if (name && names && !names.includes(plain(name))) missing.add(name)
  }
  return [...missing]
}

app.registerExtension({
  name: 'GLMImage.MissingModel',
  afterConfigureGraph() {
    const graph = app.rootGraph ?? app.graph
    const locale = app.extensionManager.setting.get('Comfy.Locale') ?? 'en'
    const texts = TEXTS[locale.startsWith('zh') ? 'zh' : 'en']
    for (const name of missingModels(graph)) {
      const key = `${graph.id} ${name}` // a tab that is shown again opens its graph again
      if (told.has(key)) continue
      told.add(key)
      app.extensionManager.toast.add({
        severity: 'warn',
        summary: texts.summary(name),
        detail: name === NAME ? texts.download : texts.choose
      })
    }
  }
})
