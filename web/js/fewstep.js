// FewStep's part of the browser: says what a chosen student is, fills in the values that it was trained for,
// and says in one sentence why a graph does not suit it. Plain widgets only, which the classic front end and
// Nodes 2.0 both draw; everything that is said is also said by the server, so graphs run without this file.
import { api } from "../../../scripts/api.js";
import { app } from "../../../scripts/app.js";

const NOTE = "student";
const FOLDERS = {
    FewStepLoadStudent: ["checkpoints", "ckpt_name"],
    CheckpointLoaderSimple: ["checkpoints", "ckpt_name"],
    FewStepLoadStudentLora: ["loras", "lora_name"],
};
const NOTED = ["FewStepLoadStudent", "FewStepLoadStudentLora", "FewStepStudentInfo"];

// ---- what the server knows of a file

const known = new Map(); // "folder/name" -> promise of the facts

function factsOf(type, inputs) {
    const [folder, input] = FOLDERS[type];
    const name = inputs[input];
    if (typeof name !== "string") return Promise.resolve(null); // fed by another node
    const key = `${folder}/${name}`;
    if (!known.has(key)) {
        const query = new URLSearchParams({ folder, name });
        const asked = api.fetchApi(`/fewstep/student?${query}`, { cache: "no-store" });
        known.set(key, asked.then((answer) => (answer.ok ? answer.json() : null), () => null));
    }
    return known.get(key);
}

async function factsOfAll(prompt) {
    const loaders = Object.entries(prompt).filter(([, node]) => node.class_type in FOLDERS);
    const facts = loaders.map(([id, node]) => factsOf(node.class_type, node.inputs).then((found) => [id, found]));
    return new Map(await Promise.all(facts));
}

const isStudent = (facts) => facts != null && facts.kind !== "other";

// ---- graphs, in the form that the server gets: {id: {class_type, inputs}}, a link being [id, slot]

/** The graph on screen in that form, without graphToPrompt, which may have effects of its own. */
function sketch(graph) {
    const prompt = {};
    for (const node of graph.nodes) {
        const inputs = {};
        for (const widget of node.widgets ?? []) inputs[widget.name] = widget.value;
        for (const slot of node.inputs ?? []) {
            const source = slot.link != null ? sourceOf(graph, slot.link) : null;
            if (source) inputs[slot.name] = source;
        }
        if (!node.isVirtualNode && node.mode === 0) prompt[node.id] = { class_type: node.comfyClass, inputs };
    }
    return prompt;
}

/** Where a link comes from, past reroutes and bypassed nodes. */
function sourceOf(graph, id) {
    const link = graph.getLink?.(id) ?? graph.links[id];
    const node = link && graph.getNodeById(link.origin_id);
    if (!node) return null;
    const bypassed = node.mode === 4;
    if (!bypassed && !node.isVirtualNode) return [String(node.id), link.origin_slot];
    const through = node.inputs?.find((slot) => slot.link != null && (!bypassed || slot.type === link.type));
    return through ? sourceOf(graph, through.link) : null;
}

const isLink = (value) => Array.isArray(value) && value.length === 2;
const CONDITIONINGS = ["conditioning", "conditioning_1", "positive"];
const nodeAt = (prompt, link) => (isLink(link) ? prompt[link[0]] : undefined);

/** The nodes from a link upwards, following the first of these inputs that is connected; of a node with a positive
and a negative prompt, whichever the link comes from. */
function* upwards(prompt, link, names) {
    const seen = new Set();
    while (nodeAt(prompt, link) && !seen.has(link[0])) {
        const [id, slot] = link;
        const { inputs } = prompt[id];
        seen.add(id);
        yield [id, prompt[id]];
        const next = slot === 1 && isLink(inputs.positive) && isLink(inputs.negative) ? ["negative"] : names;
        link = next.map((name) => inputs[name]).find(isLink);
    }
}

/** The student that a MODEL link comes from: [id of its loader, its facts], or undefined. */
function studentAt(prompt, facts, link) {
    for (const [id] of upwards(prompt, link, ["model", "model1"])) if (isStudent(facts.get(id))) return [id, facts.get(id)];
}

// ---- what does not suit a student; the server says the same while it runs, in the same words

/** Each node that samples, with the inputs that matter here by one name, wherever they come from. */
function* samplings(prompt) {
    for (const [id, { class_type: type, inputs }] of Object.entries(prompt)) {
        if (type === "FewStepKSampler") {
            yield { ...inputs, id, sampler: "fewstep", negative: null };
        } else if (inputs.sampler_name !== undefined && inputs.scheduler !== undefined && isLink(inputs.model)) {
            yield { ...inputs, id, sampler: inputs.sampler_name, guidance: undefined };
        } else if (isLink(inputs.sampler) && isLink(inputs.sigmas)) {
            const { model, cfg, negative, ...guider } = nodeAt(prompt, inputs.guider)?.inputs ?? inputs;
            const sampler = nodeAt(prompt, inputs.sampler);
            let grid;
            for (const [, node] of upwards(prompt, inputs.sigmas, ["sigmas"])) grid = node;
            yield {
                ...{ id, model, cfg, negative, positive: guider.positive ?? guider.conditioning },
                ...{ steps: grid?.inputs.steps || undefined, denoise: grid?.inputs.denoise ?? grid?.inputs.start },
                sampler: sampler?.inputs.sampler_name ?? nameOf(sampler),
                scheduler: grid?.inputs.scheduler ?? nameOf(grid),
            };
        }
    }
}

const nameOf = (node) => (node?.class_type.startsWith("FewStep") ? "fewstep" : node?.class_type);

/** A deterministic student is Euler on its own grid; every other sampler or grid needs the sampler fewstep. */
function suits({ sampler, scheduler, steps, denoise }, { spec }) {
    if (typeof sampler !== "string" || sampler === "fewstep") return true;
    const count = spec.timesteps.length;
    const onGrid = scheduler === "fewstep" || (scheduler === "simple" && 1000 % count === 0);
    return sampler === "euler" && spec.sampler === "deterministic" && onGrid && (steps ?? count) === count && (denoise ?? 1) === 1;
}

/** The guidance values that will run, in the server's order of precedence; none where they are unknown. */
function guidances(prompt, loader, sampling, facts) {
    for (const [, { class_type: type, inputs }] of upwards(prompt, sampling.positive, CONDITIONINGS)) {
        if (type !== "FewStepGuidance" && type !== "FluxGuidance") continue;
        return inputs.per_picture?.trim?.() ? inputs.per_picture.split(/[,;]/).map(Number) : [inputs.guidance];
    }
    const { cfg_is_guidance: cfgCounts = true, guidance: ofLoader } = loader.inputs;
    const chosen = sampling.guidance ?? (cfgCounts ? sampling.cfg : undefined) ?? (ofLoader || facts.guidance[2]);
    const value = nodeAt(prompt, chosen)?.inputs.value ?? chosen; // a primitive's
    return typeof value === "number" ? [value] : [];
}

/** Sentences on a graph: [{about, id, text}], each of a node's id. */
function findings(prompt, factsById) {
    const found = [];
    for (const sampling of samplings(prompt)) {
        const [loaderId, facts] = studentAt(prompt, factsById, sampling.model) ?? [];
        if (!facts?.spec) continue;
        const { id, cfg } = sampling;
        const { spec, guidance } = facts;
        const loader = prompt[loaderId];
        if (spec.direction === "encode") {
            found.push({ about: "encoder", id, text: "this student is an encoder, it turns pictures into noise; load the decoder that belongs to it" });
            continue;
        }
        if (!suits(sampling, facts)) {
            const text = `this student was made for the sampler fewstep and the timesteps ${spec.timesteps.join(", ")}; ${sampling.sampler} with these steps and this scheduler is not that: choose the sampler fewstep`;
            found.push({ about: "sampler", id, text });
        }
        if (facts.kind === "baked" && typeof cfg === "number" && cfg !== 1 && cfg !== spec.baked_guidance) {
            const text = `this file has guidance ${spec.baked_guidance} baked in: cfg ${cfg} has no effect; set cfg 1, or use the student that it was exported from`;
            found.push({ about: "guidance", id, text });
        }
        for (const value of guidance ? guidances(prompt, loader, sampling, facts) : []) {
            if (value >= guidance[0] && value <= guidance[1]) continue;
            const text = `guidance ${value} was asked for, but this student was trained for guidance ${guidance[0]} to ${guidance[1]}; choose one in that range`;
            found.push({ about: "guidance", id, text });
        }
        for (const [, { class_type: type, inputs }] of loader.inputs.live_negative ? [] : upwards(prompt, sampling.negative, CONDITIONINGS)) {
            if (!type.startsWith("CLIPTextEncode") || typeof inputs.text !== "string") continue;
            if (!inputs.text.trim() || inputs.text.trim() === spec.negative) continue;
            const baked = spec.negative ? `; "${spec.negative}" is baked in` : "";
            found.push({ about: "negative", id, text: `the negative prompt has no effect on this student${baked} (live_negative heeds one)` });
        }
    }
    for (const [id, { class_type: type, inputs }] of Object.entries(prompt)) {
        if (!type.startsWith("ModelMerge") || !studentAt(prompt, factsById, inputs.model2)) continue;
        if (studentAt(prompt, factsById, inputs.model1)) continue;
        found.push({ about: "merge", id, text: "a merge keeps the guidance dial of model1, which is no student here: the dial is gone; connect the student as model1" });
    }
    return found;
}

// ---- what people see

let said = new Set(); // what this graph was told and has not mended: neither a batch nor the server repeats it

function toast(detail, severity = "warn") {
    if (!said.has(detail)) app.extensionManager.toast.add({ severity, summary: "FewStep", detail, life: 12000 });
    said.add(detail);
}

/** Before a graph is queued: what does not suit it, and what was mended meanwhile may be said again. */
async function review(prompt) {
    const found = findings(prompt, await factsOfAll(prompt));
    said = new Set(found.map(({ text }) => text).filter((text) => said.has(text)));
    found.forEach(({ about, text }) => toast(text, about === "negative" ? "info" : "warn"));
}

/** A read-only text at a node's end, neither saved nor sent. NOTED nodes always have it; on others Nodes 2.0 may not
draw a widget that comes after an edit, so what matters there is a toast as well. */
function note(node, text) {
    let widget = node.widgets?.find(({ name }) => name === NOTE);
    if ((widget?.value ?? "") === text) return;
    if (widget && !text && !NOTED.includes(node.comfyClass)) {
        widget.onRemove?.();
        node.widgets.splice(node.widgets.indexOf(widget), 1);
    } else {
        widget ??= addNote(node);
        widget.value = text;
        widget.callback?.(text);
    }
    node.setDirtyCanvas?.(true, true);
}

function addNote(node) {
    const { widget } = app.widgets.STRING(node, NOTE, ["STRING", { multiline: true }], app);
    widget.serialize = false;
    Object.assign(widget.options, { read_only: true, serialize: false, getMinHeight: () => 80 });
    if (widget.element) widget.element.readOnly = true;
    const [width, height] = node.computeSize();
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
    return widget;
}

/** Notes on the graph on screen: what its students are, and guidance out of range (which is the answer). */
async function refresh() {
    const prompt = sketch(app.graph);
    const facts = await factsOfAll(prompt);
    const marks = findings(prompt, facts).filter(({ about }) => about === "guidance");
    for (const node of app.graph.nodes) {
        const id = String(node.id);
        const said = facts.get(id)?.sentence ?? ""; // "NAME: ...", the name standing above
        const mark = marks.find((finding) => finding.id === id)?.text ?? "";
        if (node.comfyClass === "FewStepStudentInfo") continue;
        if (!facts.has(id)) note(node, mark);
        else note(node, isStudent(facts.get(id)) || NOTED.includes(node.comfyClass) ? said.slice(said.indexOf(": ") + 2) : "");
    }
    return marks.map(({ text }) => text);
}

function fill(widget, value) {
    if (!widget || value == null || widget.value === value) return;
    widget.value = value;
    widget.callback?.(value);
}

/** After a file was chosen by hand: trained values for the samplers that it feeds. */
async function chosen(loader) {
    const prompt = sketch(app.graph);
    const facts = await factsOfAll(prompt);
    const own = facts.get(String(loader.id));
    if (isStudent(own)) {
        if (!loader.comfyClass.startsWith("FewStep")) toast(own.sentence, "info");
        const cfg = own.kind === "baked" ? 1 : loader.widgets.find((w) => w.name === "cfg_is_guidance")?.value === false ? null : own.guidance?.[2];
        for (const [id, node] of Object.entries(prompt)) {
            if (studentAt(prompt, facts, node.inputs.model)?.[0] !== String(loader.id)) continue;
            const widget = (name) => app.graph.getNodeById(id)?.widgets?.find((w) => w.name === name);
            if (node.class_type === "FewStepKSampler") fill(widget("guidance"), own.guidance?.[2]);
            else if (!node.class_type.startsWith("FewStep")) {
                fill(widget("steps"), own.steps);
                fill(widget("cfg"), cfg);
            }
        }
    }
    await refresh();
}

/** After an edit: notes, and a toast for a guidance that has just left its range. */
let outside = [];
async function edited() {
    const before = outside;
    outside = await refresh();
    outside.filter((text) => !before.includes(text)).forEach((text) => toast(text));
}

app.registerExtension({
    name: "FewStep",

    setup() {
        api.addEventListener("fewstep.say", ({ detail }) => toast(detail.text, detail.severity));
        api.addEventListener("graphChanged", () => edited());
        const queue = api.queuePrompt;
        api.queuePrompt = function (number, prompt, ...rest) {
            review(prompt.output);
            return queue.call(this, number, prompt, ...rest);
        };
    },

    afterConfigureGraph: () => edited(),

    refreshComboInNodes: () => known.clear(),

    nodeCreated(node) {
        if (NOTED.includes(node.comfyClass)) addNote(node);
        const file = node.widgets?.find((widget) => widget.name === FOLDERS[node.comfyClass]?.[1]);
        if (file) {
            let last; // unset while the load that made this node goes on: only a hand comes later
            setTimeout(() => {
                last = file.value;
                said.clear();
                edited();
            });
            const { callback } = file;
            file.callback = function (value, ...rest) {
                const result = callback?.call(this, value, ...rest);
                if (last !== undefined && value !== last) chosen(node);
                if (last !== undefined) last = value;
                return result;
            };
        }
        if (node.comfyClass === "FewStepStudentInfo") {
            const { onExecuted } = node;
            node.onExecuted = function (output) {
                onExecuted?.call(this, output);
                if (output?.text) note(this, [output.text].flat().join("\n"));
            };
        }
    },
});
