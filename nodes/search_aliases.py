"""Other words under which the page's node search finds each node.

Display names say what a node does in this pack's words; these are the words of other models, of
other packs and of everyday speech. Chinese ones stand here too, because a page that is set to
another language still searches them.
"""

ALIASES = {
    "GLMImageLoadCheckpoint": ["checkpoint loader", "load model", "all in one", "加载模型"],
    "GLMImageLoadAR": ["autoregressive", "language model", "llm", "vision language", "自回归"],
    "GLMImageLoadDecoder": ["diffusion model", "unet", "dit", "transformer", "扩散模型"],
    "GLMImageLoadGlyphEncoder": ["text encoder", "byt5", "t5", "text rendering", "文本编码器"],
    "GLMImageLoadVAE": ["autoencoder", "自编码器"],
    "GLMImageLoadLora": ["lora", "adapter", "peft", "fine-tune", "微调"],
    "GLMImageSampleTokens": [
        "autoregressive",
        "text to image",
        "generate",
        "prompt",
        "inpaint",
        "ar sampler",
        "文生图",
        "自回归",
        "局部重绘",
    ],
    "GLMImageSampleLayout": ["composition", "contact sheet", "variations", "preview", "构图"],
    "GLMImageLockLayout": ["composition", "keep composition", "region", "freeze", "构图"],
    "GLMImageComposeLayouts": ["composition", "paste", "merge", "collage", "构图", "拼接"],
    "GLMImageLayoutToTokens": ["preview", "thumbnail", "composition", "预览"],
    "GLMImageShowTokens": ["preview", "contact sheet", "draw mask", "visualise", "预览"],
    "GLMImageSaveTokens": ["export", "write tokens", "保存语义 token"],
    "GLMImageLoadTokens": ["import", "read tokens", "加载语义 token"],
    "GLMImageEncodeTokens": ["image to tokens", "sketch", "composition", "img2img", "草图", "构图"],
    "GLMImageGlyphEncode": [
        "text rendering",
        "text encode",
        "clip text encode",
        "spelling",
        "typography",
        "quotes",
        "文字渲染",
    ],
    "GLMImageEncodeReference": [
        "reference",
        "edit image",
        "image to image",
        "style transfer",
        "identity",
        "图像编辑",
        "参考",
        "图生图",
    ],
    "GLMImageReferenceCache": ["reference", "kv cache", "faster", "参考", "加速"],
    "GLMImageApplyTokens": ["conditioning", "empty latent", "prior", "条件"],
    "GLMImageSplitBatch": ["batch to list", "unbatch", "one by one", "批次转列表"],
    "GLMImageScheduler": ["sigmas", "noise schedule", "西格玛"],
    "GLMImageModelSampling": ["shift", "ksampler", "flow", "移位"],
    "GLMImageDecode": ["sampler", "ksampler", "denoise", "diffusion", "采样器", "降噪"],
    "GLMImageCropToSize": ["resize", "any size", "trim", "裁剪"],
    "GLMImageScoreTokens": ["likelihood", "prompt match", "judge", "rank", "评分"],
    "GLMImageReadText": ["ocr", "recognise text", "spelling", "judge", "文字识别"],
    "GLMImageKeepBest": ["select", "rank", "best of", "filter", "择优"],
    "GLMImageDevicePlan": ["vram", "multi gpu", "offload", "memory", "low vram", "显存", "多显卡"],
}
