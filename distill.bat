@echo off
rem Distils a checkpoint: makes a Python environment of its own the first time (.venv, beside this file), then
rem runs python -m toolkit.distill with what is typed behind: distill.bat --ckpt model.safetensors --steps 4
setlocal
set "PYTHONPATH=%~dp0;%PYTHONPATH%"
set "EMBEDDED=%~dp0..\..\..\python_embeded\python.exe"

rem Windows has a "python" that only opens its shop, and portable programs one without ensurepip: both fail here.
py -3 -c "import ensurepip, venv" >nul 2>nul && goto launcher
python -c "import ensurepip, venv" >nul 2>nul && goto python
if exist "%EMBEDDED%" goto embedded
echo fewstep: no Python was found; install one by typing the first line, and then, in a new window, the second>&2
echo     winget install -e --id Python.Python.3.12>&2
echo     "%~f0" %*>&2
exit /b 2

:launcher
py -3 -m toolkit.start distill %*
exit /b %errorlevel%

:python
python -m toolkit.start distill %*
exit /b %errorlevel%

:embedded
"%EMBEDDED%" "%~dp0toolkit\start.py" distill %*
exit /b %errorlevel%
