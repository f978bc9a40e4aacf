package service

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/config"
	"github.com/gke-metadata-emulator/gke-metadata-emulator/service/token/googletest"
)

// The benchmarks run the emulator and a bare net/http server that writes the same bytes as
// processes of their own, and this one asks both in turn.
const (
	benchServer = "GME_BENCH_SERVER" // bare, helper, pod, doctor, routing, or a configuration file
	benchListen = "GME_BENCH_LISTEN"
	benchAnswer = "GME_BENCH_ANSWER" // what bare writes: a file that holds header and body as JSON
	pairs       = 20
	turn        = 500 * time.Millisecond
	askers      = 8
)

func TestMain(m *testing.M) {
	switch server := os.Getenv(benchServer); server {
	case "":
		os.Exit(m.Run())
	case "bare":
		fmt.Fprintln(os.Stderr, bare())
	case "helper":
		fmt.Fprintln(os.Stderr, helperProcess())
	case "pod":
		fmt.Fprintln(os.Stderr, podProcess())
	case "doctor":
		err := doctorProcess()
		if err == nil {
			return
		}
		fmt.Fprintln(os.Stderr, err)
	case "routing":
		err := routingProcess()
		if err == nil {
			return
		}
		fmt.Fprintln(os.Stderr, err)
	default:
		go answerMallocs()
		if os.Getenv("LISTEN_FDS") != "" {
			_ = os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid())) // systemd does it between fork and exec
		}
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
		defer stop()
		reload := make(chan os.Signal, 1)
		signal.Notify(reload, syscall.SIGHUP)
		err := Run(ctx, Options{
			Reload: reload,
			Load:   func() (config.Config, error) { return config.Load(server, nil) }, RunDir: filepath.Dir(server),
			Version:    "bench",
			CgroupRoot: os.Getenv(cgroupRoot),
		})
		if err == nil {
			return
		}
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(1)
}

type answer struct {
	Header http.Header
	Body   []byte
}

// bare is what every Go server costs.
func bare() error {
	go answerMallocs()
	file, err := os.ReadFile(os.Getenv(benchAnswer))
	if err != nil {
		return err
	}
	var a answer
	if err := json.Unmarshal(file, &a); err != nil {
		return err
	}
	return http.ListenAndServe(os.Getenv(benchListen), http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		h := w.Header()
		for k, v := range a.Header {
			h[k] = v
		}
		_, _ = w.Write(a.Body)
	}))
}

// answerMallocs tells on standard output, for each line of standard input, how many objects were
// allocated so far.
func answerMallocs() {
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		fmt.Println(m.Mallocs)
	}
}

// BenchmarkCachedToken compares answers out of the cache with those of a bare net/http server, as
// the median of 20 interleaved pairs. of-bare is our rate as a part of its rate.
func BenchmarkCachedToken(b *testing.B) {
	ours, theirs := benchPair(b)
	for _, bb := range []struct {
		name string
		load func(addr string, size int, until time.Time) (int, error)
	}{{"KeepAlive", keepAlive}, {"Fresh", fresh}} {
		b.Run(bb.name, func(b *testing.B) {
			for range b.N {
				var ratio, cpu, ourCPU, allocs, bareAllocs []float64
				for range pairs {
					o, t := ours.measure(b, bb.load), theirs.measure(b, bb.load)
					ratio = append(ratio, o.rate/t.rate)
					cpu = append(cpu, o.cpu/t.cpu)
					ourCPU = append(ourCPU, o.cpu*1e6)
					allocs, bareAllocs = append(allocs, o.allocs), append(bareAllocs, t.allocs)
				}
				b.ReportMetric(median(ratio), "of-bare-rate")
				b.ReportMetric(median(cpu), "of-bare-cpu")
				b.ReportMetric(median(ourCPU), "µs-cpu/req")
				b.ReportMetric(median(allocs), "allocs/req")
				b.ReportMetric(median(bareAllocs), "bare-allocs/req")
				b.ReportMetric(0, "ns/op")
			}
		})
	}
}

const benchRequest = "GET /computeMetadata/v1/instance/service-accounts/default/token HTTP/1.1\r\nHost: " +
	"169.254.169.254\r\nUser-Agent: bench\r\nMetadata-Flavor: Google\r\n\r\n"

// keepAlive asks over connections that stay open, until then; it returns the number of answers.
func keepAlive(addr string, size int, until time.Time) (int, error) {
	return parallel(func() (int, error) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			return 0, err
		}
		defer c.Close()
		n, buf := 0, make([]byte, size)
		for time.Now().Before(until) {
			if err := exchange(c, buf); err != nil {
				return n, err
			}
			n++
		}
		return n, nil
	})
}

// fresh asks over a new connection each time. They end by RST: in TIME_WAIT they would use up the
// ports.
func fresh(addr string, size int, until time.Time) (int, error) {
	return parallel(func() (int, error) {
		n, buf := 0, make([]byte, size)
		for time.Now().Before(until) {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				return n, err
			}
			if err := exchange(c, buf); err != nil {
				return n, err
			}
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
			n++
		}
		return n, nil
	})
}

func exchange(c net.Conn, buf []byte) error {
	if _, err := io.WriteString(c, benchRequest); err != nil {
		return err
	}
	_, err := io.ReadFull(c, buf)
	return err
}

func parallel(f func() (int, error)) (int, error) {
	var wg sync.WaitGroup
	var n atomic.Int64
	errs := make(chan error, askers)
	for range askers {
		wg.Go(func() {
			m, err := f()
			n.Add(int64(m))
			if err != nil {
				errs <- err
			}
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		return 0, err
	default:
		return int(n.Load()), nil
	}
}

// benchPair starts both servers; bare writes what ours answered.
func benchPair(b *testing.B) (ours, theirs *process) {
	w := newWorld(b)
	w.addPod("bench", "127.0.0.1", map[string]string{"iam.gke.io/gcp-service-account": gsa})
	w.google.Allow("system:serviceaccount:default:bench", gsa)
	ourAddr, bareAddr := freeAddr(b), freeAddr(b)
	w.configure(b, "limits: {requestsPerPod: 1000000}") // one pod's, which would be what is measured
	w.replace(b, "config.yaml", "listen: 127.0.0.1:0\n", "listen: "+ourAddr+"\n")
	ours = spawn(b, ourAddr, benchServer+"="+filepath.Join(w.dir, "config.yaml"))
	var got answer
	w.eventually(b, "the emulator has the token", func() bool {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, "http://"+ourAddr+accts+"default/token", nil)
		if err != nil {
			b.Fatal(err)
		}
		req.Header.Set("Metadata-Flavor", "Google")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return false
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		res.Header.Del("Date")
		got = answer{res.Header, body}
		return err == nil && res.StatusCode == http.StatusOK
	})
	file, err := json.Marshal(got)
	if err != nil {
		b.Fatal(err)
	}
	w.write(b, "answer.json", string(file))
	theirs = spawn(b, bareAddr, benchServer+"=bare", benchListen+"="+bareAddr,
		benchAnswer+"="+filepath.Join(w.dir, "answer.json"))
	ours.size, theirs.size = answerSize(b, ourAddr), answerSize(b, bareAddr)
	if ours.size != theirs.size {
		b.Fatalf("the answers differ: %d and %d bytes", ours.size, theirs.size)
	}
	return ours, theirs
}

// BenchmarkHundredPods starts the emulator on a node with 100 pods of 100 linked ServiceAccounts,
// Google 50 ms away: how long until READY=1, how long until all tokens are there, what that costs
// in calls and in memory.
func BenchmarkHundredPods(b *testing.B) {
	const pods = 100
	var ready, tokens, resident []float64
	for b.Loop() {
		w := newWorld(b)
		for _, name := range []string{"reader", "plain", "principal", "hostile", "denied", "missing"} {
			w.kube.DeletePod("default", name)
		}
		for i := range pods {
			name := fmt.Sprintf("app-%d", i)
			email := name + "@my-project.iam.gserviceaccount.com"
			w.google.Allow("system:serviceaccount:default:"+name, email)
			w.addPod(name, fmt.Sprintf("127.0.1.%d", i), map[string]string{"iam.gke.io/gcp-service-account": email})
		}
		for _, m := range googletest.Methods {
			w.google.Break(m, googletest.Fault{Latency: 50 * time.Millisecond})
		}
		addr := freeAddr(b)
		w.configure(b)
		w.replace(b, "config.yaml", "listen: 127.0.0.1:0\n", "listen: "+addr+"\n")
		socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(w.dir, "notify"), Net: "unixgram"})
		if err != nil {
			b.Fatal(err)
		}
		began := time.Now()
		p := spawn(b, addr, benchServer+"="+filepath.Join(w.dir, "config.yaml"),
			"NOTIFY_SOCKET="+filepath.Join(w.dir, "notify"))
		for said := ""; !strings.HasPrefix(said, "READY=1"); {
			m := make([]byte, 1024)
			n, err := socket.Read(m)
			if err != nil {
				b.Fatal(err)
			}
			said = string(m[:n])
		}
		ready = append(ready, time.Since(began).Seconds()*1000)
		cached := func() (n int) {
			for _, t := range statusOf(b, w.dir).Tokens {
				if t.GoogleServiceAccount != "" && !t.Minted.IsZero() {
					n++
				}
			}
			return n
		}
		w.eventually(b, "all tokens are there", func() bool { return cached() == pods })
		tokens = append(tokens, time.Since(began).Seconds()*1000)
		if sts, iam := w.google.Calls(googletest.Exchange), w.google.Calls(googletest.GenerateAccessToken); sts != pods ||
			iam != pods {
			b.Fatalf("%d exchanges, %d access tokens", sts, iam)
		}
		resident = append(resident, p.resident(b))
		p.end()
		_ = socket.Close()
	}
	b.ReportMetric(median(ready), "ms-to-READY")
	b.ReportMetric(median(tokens), "ms-to-all-tokens")
	b.ReportMetric(median(resident), "MB-resident")
	b.ReportMetric(0, "ns/op")
}

// BenchmarkTenThousandConnections has 50 pods hold 200 idle connections each (H-20): what that
// costs in memory, and whether another pod is still answered.
func BenchmarkTenThousandConnections(b *testing.B) {
	const pods, each = 50, 200
	var resident []float64
	for b.Loop() {
		w := newWorld(b)
		for i := range pods {
			w.addPod(fmt.Sprintf("idle-%d", i), fmt.Sprintf("127.0.2.%d", i+1), nil)
		}
		addr := freeAddr(b)
		w.configure(b)
		w.replace(b, "config.yaml", "listen: 127.0.0.1:0\n", "listen: "+addr+"\n")
		p := spawn(b, addr, benchServer+"="+filepath.Join(w.dir, "config.yaml"))
		size := answerSize(b, addr)
		w.eventually(b, "pods are known", func() bool {
			st := statusOf(b, w.dir)
			return st.Cluster != nil &&
				len(st.Cluster.Pods) > pods
		})
		var open []net.Conn
		for i := range pods {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 2, byte(i+1))}}
			for range each {
				c, err := d.Dial("tcp", addr)
				if err != nil {
					b.Fatal(err)
				}
				open = append(open, c)
				if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: metadata\r\n\r\n"); err != nil {
					b.Fatal(err)
				}
				if _, err := c.Read(make([]byte, 4096)); err != nil {
					b.Fatal(err)
				}
			}
		}
		if got := statusOf(b, w.dir).Connections; got < pods*each {
			b.Fatalf("%d connections are open", got)
		}
		if again := answerSize(b, addr); again != size {
			b.Fatalf("another asker got %d bytes, and %d before", again, size)
		}
		resident = append(resident, p.resident(b))
		for _, c := range open {
			_ = c.Close()
		}
		p.end()
	}
	b.ReportMetric(median(resident), "MB-resident")
	b.ReportMetric(0, "ns/op")
}
