package routing

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestSharedCodeNamesNoMode: what modes differ in is in their traits and in mode.go. The files that
// choose a mode name modes as well.
func TestSharedCodeNamesNoMode(t *testing.T) {
	choosing := []string{"mode.go", "auto.go", "detect.go"}
	files, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`^Mode[A-Z]`)
	set := token.NewFileSet()
	read := 0
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".go") || strings.HasSuffix(f.Name(), "_test.go") ||
			slices.Contains(choosing, f.Name()) {
			continue
		}
		file, err := parser.ParseFile(set, f.Name(), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		read++
		compared := func(expressions ...ast.Expr) {
			for _, e := range expressions {
				if id, ok := e.(*ast.Ident); ok && named.MatchString(id.Name) {
					t.Errorf("%s: %s is compared with: use a trait (see traits)", set.Position(id.Pos()), id.Name)
				}
			}
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.BinaryExpr:
				if n.Op == token.EQL || n.Op == token.NEQ {
					compared(n.X, n.Y)
				}
			case *ast.CaseClause:
				compared(n.List...)
			}
			return true
		})
	}
	if read < 20 {
		t.Errorf("only %d files were read", read)
	}
}

// A mode that no row of removers keeps would be removed by the change to it.
func TestRemoversKnowEachMode(t *testing.T) {
	kept := map[string]bool{}
	for _, r := range removers {
		for _, mode := range r.keptBy {
			kept[mode] = true
			if !Supported(mode) {
				t.Errorf("no mode: %s", mode)
			}
		}
	}
	for _, mode := range modes {
		if !kept[mode] {
			t.Errorf("in no row of removers: %s", mode)
		}
	}
}
