// What grpc-go finds when it talks to the server: one line for each check, "NAME ok" or "NAME what was wrong".
//
// usage: checks TARGET FOLDER all|drain [CA CERTIFICATE KEY]. The folder has requests, the answers that are right
// for them, and what the checks are to do; see tests/integration/test_grpc_clients.py.
package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const (
	infer       = "/inference.GRPCInferenceService/ModelInfer"
	streamInfer = "/inference.GRPCInferenceService/ModelStreamInfer"
	healthCheck = "/grpc.health.v1.Health/Check"
	healthWatch = "/grpc.health.v1.Health/Watch"
	patience    = 20 * time.Second
	warmCalls   = 200

	// Fixed windows, which answers of 600 kB fill several times. By default grpc-go widens them as it measures, and
	// a stream that it opens meanwhile keeps the old limit although the SETTINGS that it sends change it too: what
	// the server then rightly sends is a FLOW_CONTROL_ERROR to it, once in a thousand large calls (seen in 1.33).
	window = 128 * 1024
)

// Messages as bytes: no generated code is needed.
type raw struct{}

func (raw) Marshal(v interface{}) ([]byte, error)      { return *v.(*[]byte), nil }
func (raw) Unmarshal(data []byte, v interface{}) error { *v.(*[]byte) = data; return nil }
func (raw) Name() string                               { return "proto" }

type client struct {
	channel *grpc.ClientConn
	folder  string
}

func (c client) file(name string) []byte {
	data, err := os.ReadFile(filepath.Join(c.folder, name))
	if err != nil {
		panic(err)
	}
	return data
}

func (c client) call(ctx context.Context, path string, request []byte, more ...grpc.CallOption) ([]byte, error) {
	var answer []byte
	err := c.channel.Invoke(ctx, path, &request, &answer, more...)
	return answer, err
}

// One inference whose answer must be the right one.
func (c client) right(ctx context.Context, name string, more ...grpc.CallOption) error {
	answer, err := c.call(ctx, infer, c.file(name+".request"), more...)
	if err == nil && !bytes.Equal(answer, c.file(name+".answer")) {
		return fmt.Errorf("wrong answer of %d bytes", len(answer))
	}
	return err
}

func (c client) stream(ctx context.Context, path string, more ...grpc.CallOption) (grpc.ClientStream, error) {
	desc := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	return c.channel.NewStream(ctx, desc, path, more...)
}

func wanted(err error, code codes.Code) error {
	if status.Code(err) != code {
		return fmt.Errorf("%v instead of %v", err, code)
	}
	return nil
}

// --- checks

func (c client) unary(ctx context.Context) error {
	for i := 0; i < 50; i++ {
		if err := c.right(ctx, []string{"small", "other"}[i%2]); err != nil {
			return err
		}
	}
	return nil
}

func (c client) metadata(ctx context.Context) error {
	every := make([]byte, 256)
	for i := range every {
		every[i] = byte(i)
	}
	var header metadata.MD
	ctx = metadata.AppendToOutgoingContext(ctx, "x-key", "grpc-go", "x-key-bin", string(every))
	if err := c.right(ctx, "small", grpc.Header(&header)); err != nil {
		return err
	}
	if len(header.Get("x-tidegate-id")) != 1 || header.Get("x-tidegate-version")[0] != "1" {
		return fmt.Errorf("initial metadata %v", header)
	}
	return nil
}

// A hundred messages both ways; their answers come in order.
func (c client) streams(ctx context.Context) error {
	stream, err := c.stream(ctx, streamInfer)
	if err != nil {
		return err
	}
	names := []string{"small", "other"}
	go func() {
		for i := 0; i < 100; i++ {
			request := c.file(names[i%2] + ".request")
			if stream.SendMsg(&request) != nil {
				return
			}
		}
		_ = stream.CloseSend()
	}()
	for i := 0; ; i++ {
		var answer []byte
		if err := stream.RecvMsg(&answer); err == io.EOF && i == 100 {
			return nil
		} else if err != nil {
			return fmt.Errorf("after %d: %w", i, err)
		}
		if !bytes.Equal(answer, c.file(names[i%2]+".streamed")) {
			return fmt.Errorf("wrong answer %d", i)
		}
	}
}

// A stream that is given up half way leaves the connection whole.
func (c client) givenUp(ctx context.Context) error {
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.stream(inner, streamInfer)
	if err != nil {
		return err
	}
	request := c.file("small.request")
	if err := stream.SendMsg(&request); err != nil {
		return err
	}
	var answer []byte
	if err := stream.RecvMsg(&answer); err != nil {
		return err
	}
	cancel()
	if err := wanted(stream.RecvMsg(&answer), codes.Canceled); err != nil {
		return err
	}
	return c.right(ctx, "small")
}

func (c client) compressed(ctx context.Context) error {
	return c.right(ctx, "large", grpc.UseCompressor(gzip.Name))
}

// 600 kB each way, eight at a time.
func (c client) large(ctx context.Context) error {
	return workers(8, func(int) error {
		for i := 0; i < 4; i++ {
			if err := c.right(ctx, "large"); err != nil {
				return err
			}
		}
		return nil
	})
}

func (c client) deadline(ctx context.Context) error {
	for i := 0; i < 10; i++ {
		late, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		_, err := c.call(late, infer, c.file("held.request"))
		cancel()
		if err := wanted(err, codes.DeadlineExceeded); err != nil {
			return err
		}
	}
	return c.right(ctx, "small")
}

// Each line of errors.txt: path, request, status, trailer retry-after or "-", text or "*".
func (c client) errors(ctx context.Context) error {
	for _, line := range strings.Split(strings.TrimSpace(string(c.file("errors.txt"))), "\n") {
		part := strings.SplitN(line, "\t", 5)
		code, _ := strconv.Atoi(part[2])
		var trailer metadata.MD
		_, err := c.call(ctx, part[0], c.file(part[1]), grpc.Trailer(&trailer))
		if err := wanted(err, codes.Code(code)); err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
		if text := status.Convert(err).Message(); part[4] != "*" && text != part[4] {
			return fmt.Errorf("%s: %q", line, text)
		}
		if after := strings.Join(trailer.Get("retry-after"), ","); part[3] != "-" && after != part[3] {
			return fmt.Errorf("%s: retry-after %q", line, after)
		}
	}
	return nil
}

func (c client) health(ctx context.Context) error {
	serving := []byte{8, 1}
	answer, err := c.call(ctx, healthCheck, nil)
	if err != nil || !bytes.Equal(answer, serving) {
		return fmt.Errorf("Check: %v %v", answer, err)
	}
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.stream(inner, healthWatch)
	if err != nil {
		return err
	}
	var empty []byte
	if err := stream.SendMsg(&empty); err != nil {
		return err
	}
	_ = stream.CloseSend()
	if err := stream.RecvMsg(&answer); err != nil || !bytes.Equal(answer, serving) {
		return fmt.Errorf("Watch: %v %v", answer, err)
	}
	return nil
}

// Eight at once on one connection, every second call of each cancelled: the kept half is right.
func (c client) storm(ctx context.Context) error {
	calls, _ := strconv.Atoi(strings.TrimSpace(string(c.file("storm.txt"))))
	return workers(8, func(worker int) error {
		for i := 0; i < calls; i++ {
			if i%2 == 0 {
				if err := c.right(ctx, "small"); err != nil {
					return fmt.Errorf("call %d of %d: %w", i, worker, err)
				}
				continue
			}
			inner, cancel := context.WithCancel(ctx)
			if i%4 == 1 {
				time.AfterFunc(time.Duration(i%7)*100*time.Microsecond, cancel)
			} else {
				cancel()
			}
			if err := c.right(inner, "small"); err != nil && status.Code(err) != codes.Canceled {
				return fmt.Errorf("cancelled call %d of %d: %w", i, worker, err)
			}
			cancel()
		}
		return nil
	})
}

func workers(count int, work func(int) error) error {
	failures := make(chan error, count)
	for i := 0; i < count; i++ {
		go func(i int) { failures <- work(i) }(i)
	}
	var first error
	for i := 0; i < count; i++ {
		if err := <-failures; err != nil && first == nil {
			first = err
		}
	}
	return first
}

// --- the server's end

// Eight callers until nobody listens any more; "warm" once enough was answered. Then a line "N what" for each outcome.
func (c client) drain() {
	var lock sync.Mutex
	tally := map[string]int{}
	note := func(what string) {
		lock.Lock()
		defer lock.Unlock()
		tally[what]++
		if what == "ok" && tally[what] == warmCalls {
			fmt.Println("warm")
		}
	}
	_ = workers(8, func(int) error {
		for {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			err := c.right(ctx, "small")
			cancel()
			if err == nil {
				note("ok")
			} else if status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "connection error:") {
				// No connection was made, by refusal or in its handshake: the call never left.
				note("refused")
				return nil
			} else {
				note(err.Error())
				return nil
			}
		}
	})
	for what, count := range tally {
		fmt.Println(count, what)
	}
}

func dialled(target string, files []string) (*grpc.ClientConn, error) {
	security := grpc.WithInsecure()
	if len(files) == 3 {
		ca, err := os.ReadFile(files[0])
		if err != nil {
			return nil, err
		}
		pair, err := tls.LoadX509KeyPair(files[1], files[2])
		if err != nil {
			return nil, err
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(ca)
		config := &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}
		security = grpc.WithTransportCredentials(credentials.NewTLS(config))
	}
	return grpc.Dial(target, security, grpc.WithInitialWindowSize(window), grpc.WithInitialConnWindowSize(window),
		grpc.WithDefaultCallOptions(
			grpc.ForceCodec(raw{}), grpc.MaxCallRecvMsgSize(64<<20), grpc.MaxCallSendMsgSize(64<<20)))
}

func main() {
	channel, err := dialled(os.Args[1], os.Args[4:])
	if err != nil {
		panic(err)
	}
	defer channel.Close()
	c := client{channel, os.Args[2]}
	if os.Args[3] == "drain" {
		c.drain()
		return
	}
	checks := []struct {
		name string
		run  func(context.Context) error
	}{
		{"unary", c.unary}, {"metadata", c.metadata}, {"stream", c.streams}, {"given_up", c.givenUp},
		{"gzip", c.compressed}, {"large", c.large}, {"deadline", c.deadline}, {"errors", c.errors},
		{"health", c.health}, {"storm", c.storm},
	}
	for _, check := range checks {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := check.run(ctx)
		cancel()
		if err == nil {
			fmt.Println(check.name, "ok")
		} else {
			fmt.Println(check.name, strings.ReplaceAll(err.Error(), "\n", " "))
		}
	}
}
