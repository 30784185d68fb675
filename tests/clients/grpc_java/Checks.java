import io.grpc.CallOptions;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptors;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.netty.GrpcSslContexts;
import io.grpc.netty.NettyChannelBuilder;
import io.grpc.stub.ClientCalls;
import io.grpc.stub.MetadataUtils;
import io.grpc.stub.StreamObserver;
import java.io.ByteArrayInputStream;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.Callable;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.ExecutorService;
import java.util.concurrent.Executors;
import java.util.concurrent.Future;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicReference;

/**
 * What grpc-java finds when it talks to the server: one line for each check, "NAME ok" or "NAME what was wrong".
 *
 * <p>usage: Checks TARGET FOLDER all|drain [CA CERTIFICATE KEY]. The folder has requests, the answers that are right for
 * them, and what the checks are to do; see tests/integration/test_grpc_clients.py.
 */
final class Checks {
  private static final String INFER = "/inference.GRPCInferenceService/ModelInfer";
  private static final String STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer";
  private static final long PATIENCE_MS = 20_000;
  private static final int WARM_CALLS = 200;
  private static final byte[] SERVING = {8, 1};

  private interface Check {
    void run() throws Exception;
  }

  /** Messages as bytes: no generated code is needed. */
  private static final MethodDescriptor.Marshaller<byte[]> RAW =
      new MethodDescriptor.Marshaller<>() {
        @Override
        public InputStream stream(byte[] value) {
          return new ByteArrayInputStream(value);
        }

        @Override
        public byte[] parse(InputStream stream) {
          try {
            return stream.readAllBytes();
          } catch (IOException error) {
            throw new UncheckedIOException(error);
          }
        }
      };

  private final ManagedChannel channel;
  private final Path folder;
  private final Map<String, byte[]> files = new ConcurrentHashMap<>();

  private Checks(ManagedChannel channel, Path folder) {
    this.channel = channel;
    this.folder = folder;
  }

  private static MethodDescriptor<byte[], byte[]> method(String path, MethodDescriptor.MethodType type) {
    return MethodDescriptor.newBuilder(RAW, RAW).setType(type).setFullMethodName(path.substring(1)).build();
  }

  private byte[] file(String name) {
    return files.computeIfAbsent(
        name,
        wanted -> {
          try {
            return Files.readAllBytes(folder.resolve(wanted));
          } catch (IOException error) {
            throw new UncheckedIOException(error);
          }
        });
  }

  private static CallOptions within(long ms) {
    return CallOptions.DEFAULT.withDeadlineAfter(ms, TimeUnit.MILLISECONDS);
  }

  private byte[] call(String path, byte[] request, CallOptions options) {
    return ClientCalls.blockingUnaryCall(channel, method(path, MethodDescriptor.MethodType.UNARY), options, request);
  }

  /** One inference whose answer must be the right one. */
  private void right(String name, CallOptions options) {
    same(call(INFER, file(name + ".request"), options), name + ".answer");
  }

  private void same(byte[] answer, String name) {
    if (!Arrays.equals(answer, file(name))) {
      throw new IllegalStateException("wrong answer of " + answer.length + " bytes for " + name);
    }
  }

  private static StatusRuntimeException fails(int code, Callable<?> work) throws Exception {
    try {
      work.call();
    } catch (StatusRuntimeException error) {
      if (error.getStatus().getCode().value() == code) {
        return error;
      }
      throw error;
    }
    throw new IllegalStateException("OK instead of " + code);
  }

  private static void require(boolean holds, Object what) {
    if (!holds) {
      throw new IllegalStateException(String.valueOf(what));
    }
  }

  private static void workers(int count, Callable<Void> work) throws Exception {
    ExecutorService pool = Executors.newFixedThreadPool(count);
    try {
      List<Future<Void>> done = new ArrayList<>();
      for (int i = 0; i < count; i++) {
        done.add(pool.submit(work));
      }
      for (Future<Void> each : done) {
        each.get();
      }
    } finally {
      pool.shutdownNow();
    }
  }

  // --- checks

  private void unary() {
    for (int i = 0; i < 50; i++) {
      right(i % 2 == 0 ? "small" : "other", within(PATIENCE_MS));
    }
  }

  private void metadata() {
    byte[] every = new byte[256];
    for (int i = 0; i < every.length; i++) {
      every[i] = (byte) i;
    }
    Metadata sent = new Metadata();
    sent.put(Metadata.Key.of("x-key", Metadata.ASCII_STRING_MARSHALLER), "grpc-java");
    sent.put(Metadata.Key.of("x-key-bin", Metadata.BINARY_BYTE_MARSHALLER), every);
    AtomicReference<Metadata> headers = new AtomicReference<>();
    var watched =
        ClientInterceptors.intercept(
            channel,
            MetadataUtils.newAttachHeadersInterceptor(sent),
            MetadataUtils.newCaptureMetadataInterceptor(headers, new AtomicReference<>()));
    var unary = method(INFER, MethodDescriptor.MethodType.UNARY);
    same(ClientCalls.blockingUnaryCall(watched, unary, within(PATIENCE_MS), file("small.request")), "small.answer");
    String version = headers.get().get(Metadata.Key.of("x-tidegate-version", Metadata.ASCII_STRING_MARSHALLER));
    String id = headers.get().get(Metadata.Key.of("x-tidegate-id", Metadata.ASCII_STRING_MARSHALLER));
    require("1".equals(version) && id != null, headers.get());
  }

  private ClientCall<byte[], byte[]> bidi() {
    return channel.newCall(method(STREAM_INFER, MethodDescriptor.MethodType.BIDI_STREAMING), within(PATIENCE_MS));
  }

  /** A hundred messages both ways; their answers come in order. */
  private void stream() throws Exception {
    List<byte[]> answers = new ArrayList<>();
    CompletableFuture<Void> over = new CompletableFuture<>();
    StreamObserver<byte[]> requests = ClientCalls.asyncBidiStreamingCall(bidi(), gathering(answers, over, () -> {}));
    for (int i = 0; i < 100; i++) {
      requests.onNext(file(i % 2 == 0 ? "small.request" : "other.request"));
    }
    requests.onCompleted();
    over.get();
    require(answers.size() == 100, answers.size() + " answers");
    for (int i = 0; i < 100; i++) {
      same(answers.get(i), i % 2 == 0 ? "small.streamed" : "other.streamed");
    }
  }

  private static StreamObserver<byte[]> gathering(List<byte[]> answers, CompletableFuture<Void> over, Runnable each) {
    return new StreamObserver<>() {
      @Override
      public void onNext(byte[] answer) {
        answers.add(answer);
        each.run();
      }

      @Override
      public void onError(Throwable error) {
        over.completeExceptionally(error);
      }

      @Override
      public void onCompleted() {
        over.complete(null);
      }
    };
  }

  /** A stream that is given up half way leaves the connection whole. */
  private void givenUp() throws Exception {
    ClientCall<byte[], byte[]> call = bidi();
    CompletableFuture<Void> over = new CompletableFuture<>();
    Runnable cancel = () -> call.cancel("given up", null);
    StreamObserver<byte[]> requests = ClientCalls.asyncBidiStreamingCall(call, gathering(new ArrayList<>(), over, cancel));
    requests.onNext(file("small.request"));
    try {
      over.get();
    } catch (ExecutionException error) {
      require(Status.fromThrowable(error.getCause()).getCode() == Status.Code.CANCELLED, error);
    }
    right("small", within(PATIENCE_MS));
  }

  /** 600 kB each way, eight at a time. */
  private void large() throws Exception {
    workers(
        8,
        () -> {
          for (int i = 0; i < 4; i++) {
            right("large", within(PATIENCE_MS));
          }
          return null;
        });
  }

  private void deadline() throws Exception {
    for (int i = 0; i < 10; i++) {
      fails(Status.Code.DEADLINE_EXCEEDED.value(), () -> call(INFER, file("held.request"), within(50)));
    }
    right("small", within(PATIENCE_MS));
  }

  /** Each line of errors.txt: path, request, status, trailer retry-after or "-", text or "*". */
  private void errors() throws Exception {
    for (String line : new String(file("errors.txt"), StandardCharsets.UTF_8).strip().split("\n")) {
      String[] part = line.split("\t", 5);
      var error = fails(Integer.parseInt(part[2]), () -> call(part[0], file(part[1]), within(PATIENCE_MS)));
      String text = error.getStatus().getDescription();
      require(part[4].equals("*") || part[4].equals(text), line + ": " + text);
      String after = error.getTrailers().get(Metadata.Key.of("retry-after", Metadata.ASCII_STRING_MARSHALLER));
      require(part[3].equals("-") || part[3].equals(after), line + ": retry-after " + after);
    }
  }

  private void health() {
    byte[] empty = {};
    byte[] checked = call("/grpc.health.v1.Health/Check", empty, within(PATIENCE_MS));
    require(Arrays.equals(checked, SERVING), Arrays.toString(checked));
    var watch = method("/grpc.health.v1.Health/Watch", MethodDescriptor.MethodType.SERVER_STREAMING);
    Iterator<byte[]> told = ClientCalls.blockingServerStreamingCall(channel, watch, within(1000), empty);
    byte[] first = told.next();
    require(Arrays.equals(first, SERVING), Arrays.toString(first));
  }

  /** Eight at once on one connection, every second call of each cancelled: the kept half is right. */
  private void storm() throws Exception {
    int calls = Integer.parseInt(new String(file("storm.txt"), StandardCharsets.UTF_8).strip());
    workers(
        8,
        () -> {
          for (int i = 0; i < calls; i++) {
            if (i % 2 == 0) {
              right("small", within(PATIENCE_MS));
              continue;
            }
            var call = channel.newCall(method(INFER, MethodDescriptor.MethodType.UNARY), within(PATIENCE_MS));
            var answer = ClientCalls.futureUnaryCall(call, file("small.request"));
            if (i % 4 == 1) {
              Thread.yield();
            }
            answer.cancel(false);
          }
          return null;
        });
  }

  // --- the server's end

  /** Eight callers until nobody listens any more; "warm" once enough was answered. Then "N what" for each outcome. */
  private void drain() throws Exception {
    Map<String, Integer> tally = new ConcurrentHashMap<>();
    workers(
        8,
        () -> {
          while (true) {
            try {
              right("small", within(PATIENCE_MS));
            } catch (StatusRuntimeException error) {
              boolean refused = String.valueOf(error.getCause()).contains("Connection refused");
              tally.merge(refused ? "refused" : String.valueOf(error.getMessage()), 1, Integer::sum);
              return null;
            }
            if (tally.merge("ok", 1, Integer::sum) == WARM_CALLS) {
              System.out.println("warm");
            }
          }
        });
    tally.forEach((what, count) -> System.out.println(count + " " + what));
  }

  private void all() {
    Map<String, Check> checks = new LinkedHashMap<>();
    checks.put("unary", this::unary);
    checks.put("metadata", this::metadata);
    checks.put("stream", this::stream);
    checks.put("given_up", this::givenUp);
    checks.put("gzip", () -> right("large", within(PATIENCE_MS).withCompression("gzip")));
    checks.put("large", this::large);
    checks.put("deadline", this::deadline);
    checks.put("errors", this::errors);
    checks.put("health", this::health);
    checks.put("storm", this::storm);
    checks.forEach(
        (name, check) -> {
          String said = "ok";
          try {
            check.run();
          } catch (Exception error) {
            said = error.toString().replace('\n', ' ');
          }
          System.out.println(name + " " + said);
        });
  }

  public static void main(String[] args) throws Exception {
    NettyChannelBuilder builder = NettyChannelBuilder.forTarget(args[0]).maxInboundMessageSize(64 << 20);
    if (args.length == 6) {
      // This Netty leaves TLS 1.3 out unless it is named.
      var context = GrpcSslContexts.forClient().protocols("TLSv1.3", "TLSv1.2").trustManager(new File(args[3]));
      builder.sslContext(context.keyManager(new File(args[4]), new File(args[5])).build());
    } else {
      builder.usePlaintext();
    }
    ManagedChannel channel = builder.build();
    Checks checks = new Checks(channel, Path.of(args[1]));
    if (args[2].equals("drain")) {
      checks.drain();
    } else {
      checks.all();
    }
    channel.shutdownNow().awaitTermination(5, TimeUnit.SECONDS);
  }
}
