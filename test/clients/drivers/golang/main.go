// Command golang answers what the ring asks of Google's libraries for Go. Its first argument is the
// library. Each line of standard input is a question, each line of standard output a JSON answer;
// the ring's client.go says which there are.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"time"
)

const (
	scope    = "https://www.googleapis.com/auth/devstorage.read_only"
	audience = "https://run.example.com"
)

// errNone says that the library has no such thing.
var errNone = errors.New("none")

// library is what can be asked of a library. It does not have what is asked by other questions.
type library struct {
	module string
	ask    map[string]func(context.Context) (string, error)
}

func main() {
	libraries := map[string]func(endpoint string) library{
		"metadata": computeMetadata, "oauth2": oauth2Google, "auth": cloudAuth, "storage": cloudStorage,
		"registry": registryKeychain, "otel": openTelemetry,
	}
	l := libraries[os.Args[1]](os.Getenv("RING_STORAGE"))
	l.ask["version"] = func(context.Context) (string, error) { return versionOf(l.module) }
	say := json.NewEncoder(os.Stdout)
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		var a struct {
			Value string `json:"value"`
			Error string `json:"error,omitempty"`
			None  bool   `json:"none,omitempty"`
		}
		err := errNone
		if ask := l.ask[in.Text()]; ask != nil {
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			a.Value, err = ask(ctx)
			cancel()
		}
		if a.None = errors.Is(err, errNone); err != nil && !a.None {
			a.Error = err.Error()
		}
		_ = say.Encode(a) // the ring left: nobody to tell
	}
}

func versionOf(module string) (string, error) {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "", errors.New("the program has no build information")
	}
	for _, d := range info.Deps {
		if d.Path == module {
			return d.Version, nil
		}
	}
	return "", fmt.Errorf("%s is not in the program", module)
}

// yes is the answer to whether Google Cloud was detected.
func yes(err error) (string, error) { return strconv.FormatBool(err == nil), err }
