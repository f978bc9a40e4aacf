package attest

import (
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkLook is what a connection costs, with 110 pods on the node.
func BenchmarkLook(b *testing.B) {
	n := newTestNode(b)
	pod := n.client(containerPath(1, 1), n.pod("asks"))
	host := n.client(containerPath(2, 2), n.node.NS)
	for i := range 109 {
		n.sleeper(containerPath(10+i, i), n.pod(fmt.Sprint("p", i)))
	}
	n.startHelper()
	eventually(b, "all pods are known", func() bool { return n.kernel.Status().Namespaces == 110 })
	for name, c := range map[string]*client{"pod": pod, "host": host} {
		conn := accepted(n.accept(c.do(dial)))
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := n.kernel.Look(conn); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
	e, err := n.kernel.Look(accepted(n.accept(pod.do(dial))))
	if err != nil {
		b.Fatal(err)
	}
	b.Run("alive", func(b *testing.B) { // all that is added to a request on a connection that is kept
		for b.Loop() {
			if !e.Alive() {
				b.Fatal("dead")
			}
		}
	})
}

// BenchmarkFreshConnection connects, sends a byte and gets one; every second connection is looked
// at before that is read. Medians are reported.
func BenchmarkFreshConnection(b *testing.B) {
	n := newTestNode(b)
	c := n.client(containerPath(1, 1), n.pod("asks"))
	n.startHelper()
	n.mustBe(c, dial, podUID(1), containerIDOf(1))
	connections := n.accepted
	go func() {
		looked := false
		for conn := range connections {
			looked = !looked
			looked := looked
			go func() {
				defer conn.Close()
				there := accepted(conn)
				if looked {
					if _, err := n.kernel.Look(there); err != nil {
						b.Error(err)
					}
				}
				at := make([]byte, 1)
				if _, err := conn.Read(at); err == nil {
					_, _ = conn.Write(at)
				}
			}()
		}
	}()
	b.ResetTimer()
	medians := strings.Fields(c.do("bench %s %d", metadataAddr, max(8, b.N)))
	with, err1 := strconv.ParseFloat(medians[0], 64)
	without, err2 := strconv.ParseFloat(medians[1], 64)
	if err1 != nil || err2 != nil {
		b.Fatal(medians)
	}
	b.ReportMetric(with/1e3, "µs-with")
	b.ReportMetric(without/1e3, "µs-without")
	b.ReportMetric((with-without)/1e3, "µs-added")
}

// BenchmarkPods starts a helper where there are pods, and tells when all are known, and what that
// holds.
func BenchmarkPods(b *testing.B) {
	for _, pods := range []int{110, 500} {
		b.Run(strconv.Itoa(pods), func(b *testing.B) {
			n := newTestNode(b)
			for i := range pods {
				n.sleeper(containerPath(i, i), n.pod(fmt.Sprint("p", i)))
			}
			heap := func() float64 {
				runtime.GC()
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				return float64(m.HeapAlloc)
			}
			files, memory := openFiles(b, "self"), heap()
			for b.Loop() {
				n.startHelperAt(n.cgroups)
				n.connected()
				eventually(b, "all pods are known", func() bool { return n.kernel.Status().Namespaces == pods })
				b.StopTimer()
				b.ReportMetric(float64(openFiles(b, "self")-files)/float64(pods), "descriptors/pod")
				b.ReportMetric((heap()-memory)/float64(pods), "B-heap/pod")
				start := time.Now()
				n.kernel.cgroups.walk()
				b.ReportMetric(float64(time.Since(start).Microseconds())/1e3, "ms-walk")
				helper := strconv.Itoa(n.helper.Process.Pid)
				b.ReportMetric(float64(openFiles(b, helper)), "helper-descriptors")
				b.ReportMetric(resident(b, helper), "helper-MB")
				n.killHelper()
				b.StartTimer()
			}
		})
	}
}

// BenchmarkScan is what the helper does when it or a server starts: it finds the namespaces of 110
// pods, among 60 units of the node, and opens the sockets in them.
func BenchmarkScan(b *testing.B) {
	n := newTestNode(b)
	var node uint64
	if err := n.node.Do(func() (err error) { node, err = networkNamespace("thread-self"); return err }); err != nil {
		b.Fatal(err)
	}
	for i := range 110 {
		n.sleeper(containerPath(i, i), n.pod(fmt.Sprint("p", i)))
	}
	for i := range 60 {
		n.sleeper(fmt.Sprintf("/system.slice/unit-%d.service", i), n.node.NS)
	}
	p, err := newPoller()
	if err != nil {
		b.Fatal(err)
	}
	defer p.close()
	for b.Loop() {
		g, err := newCgroups(n.cgroups, quiet())
		if err != nil {
			b.Fatal(err)
		}
		h := &Helper{options: HelperOptions{Log: quiet()}, home: node, poller: p, cgroups: g, found: map[uint64]*anchor{},
			pending: map[string]*look{}}
		h.sweep()
		opened := openIn(slices.Collect(maps.Values(h.found)))
		b.StopTimer()
		if len(opened) != 110 {
			b.Fatalf("%d namespaces, %s", len(opened), h.problem)
		}
		for _, o := range opened {
			if o.err != nil {
				b.Fatal(o.err)
			}
			_, _ = unix.Close(o.diag), unix.Close(o.route)
			h.lose(o.anchor)
		}
		g.close()
		b.StartTimer()
	}
}

// BenchmarkNewPod is the time from the start of a pod's first process until its namespace can be
// asked.
func BenchmarkNewPod(b *testing.B) {
	n := newTestNode(b)
	n.startHelper()
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		ns := n.pod(fmt.Sprint("p", i))
		b.StartTimer()
		n.sleeper(containerPath(i, i), ns)
		for n.kernel.Status().Namespaces <= i {
			<-time.After(100 * time.Microsecond)
		}
	}
}

// BenchmarkDeath is the time from the kill of a pod's last process until its evidence is dead, and
// its namespace let go.
func BenchmarkDeath(b *testing.B) {
	n := newTestNode(b)
	n.startHelper()
	var evidence, let []time.Duration
	for i := 0; b.Loop(); i++ {
		b.StopTimer()
		c := n.client(containerPath(i, i), n.pod(fmt.Sprint("p", i)))
		e, _ := n.mustBe(c, dial, podUID(i), containerIDOf(i))
		gone := make(chan time.Time, 1)
		b.StartTimer()
		start := time.Now()
		if err := c.cmd.Process.Kill(); err != nil {
			b.Fatal(err)
		}
		go func() {
			for n.kernel.Status().Namespaces > 0 {
				<-time.After(100 * time.Microsecond)
			}
			gone <- time.Now()
		}()
		for e.Alive() {
			<-time.After(100 * time.Microsecond)
		}
		evidence = append(evidence, time.Since(start))
		let = append(let, (<-gone).Sub(start))
		_ = c.cmd.Wait()
	}
	slices.Sort(evidence)
	slices.Sort(let)
	b.ReportMetric(float64(evidence[len(evidence)/2].Microseconds()), "µs-evidence")
	b.ReportMetric(float64(evidence[len(evidence)-1].Microseconds()), "µs-evidence-max")
	b.ReportMetric(float64(let[len(let)/2].Microseconds()), "µs-namespace")
	b.ReportMetric(float64(let[len(let)-1].Microseconds()), "µs-namespace-max")
}

// resident is a process's memory, in MB.
func resident(b *testing.B, pid string) float64 {
	text, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		b.Fatal(err)
	}
	_, after, _ := strings.Cut(string(text), "VmRSS:")
	kb, err := strconv.ParseFloat(strings.Fields(after)[0], 64)
	if err != nil {
		b.Fatal(err)
	}
	return kb / 1024
}
