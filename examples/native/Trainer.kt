// Train what `edgetune ship --target android` laid out, with ONNX Runtime's Java API (com.microsoft.onnxruntime:
// onnxruntime-android): read target.json, run the step, feed its gradients to the optimizer, swap the states.
//
// NOT COMPILED HERE: there is no Android SDK where edgetune is tested. It does step by step what train.cpp does, which
// is compiled and compared. Call it from a background thread; a step takes seconds.

package edgetune.sample

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import java.io.File
import java.io.RandomAccessFile
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.FloatBuffer
import java.nio.LongBuffer
import java.nio.channels.FileChannel
import kotlin.math.cos
import kotlin.math.pow
import kotlin.math.sin
import org.json.JSONArray
import org.json.JSONObject

class Row(val ids: LongArray, val labels: LongArray)

class Floats(val shape: LongArray, val values: FloatArray) {
    constructor(vararg shape: Long) : this(shape, FloatArray(shape.fold(1L) { a, b -> a * b }.toInt()))
}

/**
 * [folder] holds target.json and everything beside it: the files of all asset packs in one folder. ONNX Runtime reads a
 * graph's weights beside the graph and follows no link out of that folder, so copy a fast-follow pack there
 * (AssetPackManager.getPackLocation(pack).assetsPath()) and give it back (removePack), one pack after the other.
 */
class Trainer(private val folder: File) : AutoCloseable {
    private val shipped = JSONObject(File(folder, "target.json").readText()).also {
        require(it.getString("format") == "edgetune-target" && it.getInt("format_version") == 1) { "another format" }
    }
    private val prefix = shipped.getJSONObject("adapter").getString("prefix")
    private val environment = OrtEnvironment.getEnvironment()
    private val step = Graph("step")
    private val adamw = Graph("adamw")

    /** By graph input: every LoRA parameter and its two moments. */
    private var state = readAdapter(File(folder, shipped.getJSONObject("adapter").getString("file"))).let { parameters ->
        parameters + parameters.flatMap { (name, value) ->
            listOf("$name.exp_avg", "$name.exp_avg_sq").map { it to Floats(*value.shape) }
        }
    }
    private val parameters = state.keys.filter { !it.endsWith(".exp_avg") && !it.endsWith(".exp_avg_sq") }
    private var stepsDone = 0

    /** One optimizer step on some rows; returns their loss before it. A step that is not finite changes nothing. */
    fun train(rows: List<Row>, learningRate: Float, weightDecay: Float = 0f): Float {
        val optimizer = shipped.getJSONObject("optimizer")
        val scalars = mapOf(
            "loss_scale" to 1f,
            "learning_rate" to learningRate,
            "weight_decay" to weightDecay,
            "max_grad_norm" to optimizer.getDouble("max_grad_norm").toFloat(),
            "step" to (stepsDone + 1).toFloat(),
        ).mapValues { Floats(longArrayOf(1), floatArrayOf(it.value)) }
        val gradients = step.run(tokens(rows), tables(rows) + scalars + state)
        val updated = adamw.run(emptyMap(), scalars + state + gradients)
        val loss = gradients.getValue("loss").values[0]
        check(loss.isFinite() && updated.getValue("grad_norm").values[0].isFinite()) { "not finite; learn slower" }
        state = state.keys.associateWith { updated.getValue("$it.next") }
        stepsDone++
        return loss
    }

    /** Write the adapter in PEFT's format: the length of a JSON header, the header, the bytes. */
    fun save(file: File) {
        val header = JSONObject()
        var end = 0L
        for (name in parameters) {
            val value = state.getValue(name)
            val start = end
            end += 4L * value.values.size
            header.put(prefix + name, JSONObject()
                .put("dtype", "F32")
                .put("shape", JSONArray(value.shape.toList()))
                .put("data_offsets", JSONArray(listOf(start, end))))
        }
        val text = header.toString().toByteArray().let { it + ByteArray((8 - it.size % 8) % 8) { ' '.code.toByte() } }
        val data = ByteBuffer.allocate((8 + text.size + end).toInt()).order(ByteOrder.LITTLE_ENDIAN)
        data.putLong(text.size.toLong()).put(text)
        for (name in parameters) state.getValue(name).values.forEach { data.putFloat(it) }
        val partial = File(file.path + ".partial")
        partial.writeBytes(data.array())
        check(partial.renameTo(file)) { "cannot write $file" } // killed before: the old adapter is still there
    }

    override fun close() {
        step.session.close()
        adamw.session.close()
    }

    private inner class Graph(role: String) {
        private val described = shipped.getJSONArray("graphs").objects().first { it.getString("role") == role }
        private val inputs = described.getJSONArray("inputs").objects().map { it.getString("name") }
        val session: OrtSession =
            environment.createSession(File(folder, described.getString("file")).path, OrtSession.SessionOptions())

        fun run(tokens: Map<String, Pair<LongArray, LongArray>>, floats: Map<String, Floats>): Map<String, Floats> {
            val feed = inputs.associateWith { name ->
                tokens[name]?.let { (shape, ids) -> OnnxTensor.createTensor(environment, LongBuffer.wrap(ids), shape) }
                    ?: floats.getValue(name).let {
                        OnnxTensor.createTensor(environment, FloatBuffer.wrap(it.values), it.shape)
                    }
            }
            try {
                session.run(feed).use { result ->
                    return result.associate { (name, value) ->
                        val tensor = value as OnnxTensor
                        val buffer = tensor.floatBuffer
                        name to Floats(tensor.info.shape, FloatArray(buffer.remaining()).also { buffer.get(it) })
                    }
                }
            } finally {
                feed.values.forEach { it.close() }
            }
        }
    }

    private fun tokens(rows: List<Row>): Map<String, Pair<LongArray, LongArray>> {
        val longest = rows.maxOf { it.ids.size }
        val shape = longArrayOf(rows.size.toLong(), longest.toLong())
        val ids = LongArray(rows.size * longest) { shipped.getJSONObject("tokenizer").getLong("pad_token_id") }
        val labels = LongArray(rows.size * longest) { -100 }
        rows.forEachIndexed { index, row ->
            row.ids.copyInto(ids, index * longest)
            row.labels.copyInto(labels, index * longest, startIndex = 1) // a label is the token that shall follow
        }
        return mapOf("input_ids" to (shape to ids), "labels" to (shape to labels))
    }

    private fun tables(rows: List<Row>): Map<String, Floats> {
        val architecture = shipped.getJSONObject("architecture")
        val rope = architecture.getJSONObject("rope")
        val (size, longest, dim) = Triple(rows.size, rows.maxOf { it.ids.size }, rope.getInt("dim"))
        val window = if (architecture.isNull("sliding_window")) longest else architecture.getInt("sliding_window")
        val bias = Floats(size.toLong(), 1, longest.toLong(), longest.toLong())
        for (i in bias.values.indices) {
            val (query, key) = i / longest % longest to i % longest
            bias.values[i] = if (key <= query && key > query - window) 0f else -1e4f
        }
        val long = longest > rope.getInt("original_max_position_embeddings")
        val factors = rope.optJSONArray(if (long) "long_factor" else "short_factor")
        val cosines = Floats(size.toLong(), longest.toLong(), dim.toLong())
        val sines = Floats(size.toLong(), longest.toLong(), dim.toLong())
        for (i in cosines.values.indices) {
            val (position, pair) = i / dim % longest to i % (dim / 2)
            val factor = factors?.getDouble(pair) ?: 1.0
            val angle = position / (factor * rope.getDouble("theta").pow(2.0 * pair / dim))
            cosines.values[i] = (cos(angle) * rope.getDouble("attention_factor")).toFloat()
            sines.values[i] = (sin(angle) * rope.getDouble("attention_factor")).toFloat()
        }
        return mapOf("attn_bias" to bias, "rope_cos" to cosines, "rope_sin" to sines)
    }

    private fun readAdapter(file: File): Map<String, Floats> = RandomAccessFile(file, "r").use { opened ->
        val data = opened.channel.map(FileChannel.MapMode.READ_ONLY, 0, opened.length()).order(ByteOrder.LITTLE_ENDIAN)
        val text = ByteArray(data.getLong(0).toInt())
        data.position(8)
        data.get(text)
        val header = JSONObject(String(text))
        header.keys().asSequence().filter { it != "__metadata__" }.associate { name ->
            val entry = header.getJSONObject(name)
            require(entry.getString("dtype") == "F32") { "$name is not in float32" }
            val shape = entry.getJSONArray("shape").let { list -> LongArray(list.length()) { list.getLong(it) } }
            val value = Floats(*shape)
            data.position(8 + text.size + entry.getJSONArray("data_offsets").getInt(0))
            data.slice().order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer().get(value.values)
            name.removePrefix(prefix) to value
        }
    }
}

private fun JSONArray.objects(): List<JSONObject> = List(length()) { getJSONObject(it) }

/** Three epochs of rows that `edgetune preview --json` wrote. */
fun personalise(folder: File, rows: File, adapter: File) {
    val read = rows.readLines().map { JSONObject(it) }.map { row ->
        fun longs(key: String) = row.getJSONArray(key).let { list -> LongArray(list.length()) { list.getLong(it) } }
        Row(longs("input_ids"), longs("labels"))
    }
    Trainer(folder).use { trainer ->
        repeat(3) { for (batch in read.chunked(4)) println("loss ${trainer.train(batch, learningRate = 2e-4f)}") }
        trainer.save(adapter)
    }
}
